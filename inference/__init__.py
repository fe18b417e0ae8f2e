"""The model: torch, transformers, safetensors. Knows nothing of peers and sockets."""
