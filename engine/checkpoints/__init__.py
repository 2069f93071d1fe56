"""Model folders: config, tensor headers, adapters, vocabularies, tensors, safetensors writer. Knows no plan."""
