"""Mixtures of experts made smaller: the experts of a layer are grouped, aligned and merged."""
