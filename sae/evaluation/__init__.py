"""What dictionaries are worth: metrics, evaluation of sites and of sweeps, plots."""
