"""How much of the behaviour a circuit keeps when everything else is ablated."""
