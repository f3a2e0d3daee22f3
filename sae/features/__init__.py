"""What features stand for: their strongest contexts, and their matches in other dictionaries."""
