"""A finished merge as one HTML page."""
