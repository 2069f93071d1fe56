"""From which model each tensor of the output, and each row of its embedding, comes."""
