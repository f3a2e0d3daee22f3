"""Commands that test circuits, one file each."""
