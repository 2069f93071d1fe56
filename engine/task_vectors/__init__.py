"""Task vectors, their coefficients, and the streamed sums over them."""
