"""Intervals over prompts, and estimates held against exact patching."""
