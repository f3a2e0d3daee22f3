"""From text to batches of tokens, and from tokens to activations, in memory or on disk."""
