"""The three actors as plain classes: state and calls. Knows no Ray; `cluster/` makes them remote."""
