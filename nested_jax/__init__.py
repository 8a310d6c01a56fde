"""Models that keep learning: memories written inside the forward pass and between steps (arXiv:2512.24695v1)."""
