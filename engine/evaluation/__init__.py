"""Scores of models on records and tasks."""
