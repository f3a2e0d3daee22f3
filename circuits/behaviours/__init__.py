"""Behaviours that nobody asked for: contexts that a model predicts well, clustered by how it predicts them."""
