"""`python -m circuits.cli` is `sfc`."""

from circuits.cli.main import main

main()
