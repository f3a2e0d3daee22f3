"""Debiasing a classifier through its circuit (SHIFT, Marks et al. 2024, section 4), and tests of how well it went."""
