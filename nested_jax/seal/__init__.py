"""SEAL (arXiv:2506.10943v2): models that write their own training data, and learn what to write from what it does to them."""
