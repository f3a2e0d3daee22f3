"""From text to feature dictionaries: model access, sparse autoencoders, their training and their evaluation."""
