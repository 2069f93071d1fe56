"""Model merging: mathematics, model files, config, run state. Knows no Ray: `cluster/` runs it, through `actors/`."""

__version__ = "0.1.0"
