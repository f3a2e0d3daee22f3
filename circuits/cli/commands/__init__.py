"""One file a command of `sfc`, two where commands share their options: a dataclass of options with its `run`."""
