"""The formats of other programs, one file each: its writer and its reader."""
