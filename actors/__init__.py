"""The three actors as plain classes. They do not depend on Ray; `cluster/` makes them remote."""
