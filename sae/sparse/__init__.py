"""The fast part of a training step; a reader of an architecture may ignore this folder.

Its results are those of plain dense autograd. `encoder_pass` makes pre-activations and finds the few that can be
active, `activations` decodes them and has the gradients, and `triton_kernels` does the same sums on a GPU.
"""
