"""Training, fine-tuning and sweeps of autoencoders, with checkpoints and run folders."""
