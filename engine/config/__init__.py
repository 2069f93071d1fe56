"""The YAML as typed, frozen data."""
