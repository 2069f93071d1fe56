"""Evaluation: metrics of models on records of data files and on tasks. Knows no Ray."""
