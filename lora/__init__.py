"""Low-rank adapters: injection, adapter files, merge."""
