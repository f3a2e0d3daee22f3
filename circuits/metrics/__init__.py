"""Metrics: one number per example, from logits or from a probe."""
