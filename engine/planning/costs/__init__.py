"""The costs of a merge: estimates of memory, traffic, time and disk space, and the bounds that follow from them."""
