"""The Ray layer: the driver of a merge, the placement of its actors, and the communication between them."""
