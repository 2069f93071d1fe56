"""The plan of a merge, from config and headers alone, and what it will cost."""
