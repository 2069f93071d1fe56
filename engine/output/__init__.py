"""The output folder: the files of the model, the record of the merge, the model card. Knows no Ray."""
