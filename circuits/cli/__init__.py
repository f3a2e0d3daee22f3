"""The command line: `main` chooses a command of `commands`, `parser` reads its options."""
