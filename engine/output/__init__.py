"""The output: the model folder, the record of the merge, the model card."""
