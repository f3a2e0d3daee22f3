"""Commands that find circuits, one file each."""
