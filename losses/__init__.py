"""Contrastive losses on tensors that are already gathered."""
