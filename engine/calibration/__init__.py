"""Calibration records and how they become samples."""
