"""What a run folder may hold, and who may write to it."""
