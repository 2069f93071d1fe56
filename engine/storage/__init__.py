"""Folders on a disk and in object storage: a file is there whole or not at all. Knows bytes and names only."""
