"""The `search` section of a config, and the values of the keys of its space."""
