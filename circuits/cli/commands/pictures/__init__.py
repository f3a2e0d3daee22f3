"""Commands that show and write circuits, one file each, two where they share their options."""
