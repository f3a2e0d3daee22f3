"""How far to trust a circuit: what it says of other samples, phrasings, families of prompts and autoencoders."""
