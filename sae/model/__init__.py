"""A Hugging Face model whose sites can be read and changed."""
