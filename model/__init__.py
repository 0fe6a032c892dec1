"""Towers, pooling, heads, Hugging Face weights in, log-mel on the device."""
