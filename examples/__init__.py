"""Runnable stories, with the data they need inside the package."""
