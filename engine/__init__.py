"""Merging mathematics, files and models. Knows no Ray: `actors/` holds its objects, `cluster/` places them."""

__version__ = "0.1.0"
