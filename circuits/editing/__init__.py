"""Ablating and steering features, and measuring what changes."""
