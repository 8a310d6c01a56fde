"""Memories written inside the forward pass: pure functions on arrays and pytrees."""
