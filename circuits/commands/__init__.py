"""The subcommands of `sfc`: one module each, with its options as a dataclass whose `run` does the work."""
