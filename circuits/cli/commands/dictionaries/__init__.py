"""Commands about feature dictionaries, one file each."""
