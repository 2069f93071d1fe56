"""What a machine with a GPU must show before the engine is trusted on it, in minutes and without a network.

`make gpu-check` runs all checks on a GPU, `make gpu-check-dry` the same code on a CPU, small. See benchmarks/README.md.
"""
