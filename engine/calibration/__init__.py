"""Calibration records and their encoding as samples. Knows no merge: runs no model and reads no weights."""
