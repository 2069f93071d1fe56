"""Model folders: config, tensor headers, adapters, vocabularies, tensors, and the safetensors writer."""
