"""Everything that knows Ray: where actors run, how they talk, and the driver that runs the algorithm over them."""
