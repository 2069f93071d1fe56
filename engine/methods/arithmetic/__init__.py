"""The arithmetic that weight-space methods share."""
