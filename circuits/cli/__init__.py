"""The command line: `main` chooses a command, every other file here is one."""
