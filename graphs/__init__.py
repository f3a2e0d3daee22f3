"""A feature graph and every way to see it. Knows nothing of torch or of models."""
