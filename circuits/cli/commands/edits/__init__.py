"""Commands that edit the model, one file each, two where they share their options."""
