"""Contents of a run folder, and locks for those who write to it."""
