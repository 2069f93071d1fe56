"""Searches for the options of a merge: the space, the objective, the study, and the record of trials."""
