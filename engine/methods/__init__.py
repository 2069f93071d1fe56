"""Merge methods: one file per weight-space method or family, the options of the learned methods, and the registry."""
