"""Features one by one: their strongest contexts, and their matches in other dictionaries."""
