"""Streams over the experts' files: what shards do, wherever they run."""
