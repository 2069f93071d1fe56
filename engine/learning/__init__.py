"""Targets, losses, the student, the optimiser step and the importance of tensors."""
