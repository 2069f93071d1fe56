"""Folders on a disk and in object storage, in which a file appears only when it is complete. Knows no models."""
