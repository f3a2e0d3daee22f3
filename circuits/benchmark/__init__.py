"""Score dictionaries on tasks, without a language model as a judge (SAEBench, Karvonen et al. 2025)."""
