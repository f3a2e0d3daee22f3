"""Methods compared on one prompt set: against exact patching, and by how faithful their circuits are."""
