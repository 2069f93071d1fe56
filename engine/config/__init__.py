"""The config YAML as typed, frozen data. Knows no checkpoint, no torch and no Ray; reads no file but the config."""
