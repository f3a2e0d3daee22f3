"""From prompts to a sparse feature circuit, and from the circuit back to the model's behaviour."""
