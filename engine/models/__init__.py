"""Models of transformers: loaded, built empty, filled, and run with and without their head."""
