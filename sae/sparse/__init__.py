"""The fast training step on active entries only. A reader may ignore this folder: it changes speed, not results."""
