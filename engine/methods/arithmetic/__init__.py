"""Arithmetic shared by the weight-space methods."""
