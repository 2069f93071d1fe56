"""Models of transformers: built without weights, filled, and run with and without their output head."""
