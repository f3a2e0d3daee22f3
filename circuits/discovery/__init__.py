"""From prompts to a circuit: node pass, choice of nodes, edge pass, in batches that can be resumed."""
