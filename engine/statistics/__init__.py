"""What experts say of themselves: moments of the inputs of their linear layers, and squared gradients."""
