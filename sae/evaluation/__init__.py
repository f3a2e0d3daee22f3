"""Metrics of dictionaries, evaluation of sites and of sweeps, plots."""
