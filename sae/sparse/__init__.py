"""The fast part of a training step; a reader of an architecture may ignore this folder.

Its results are those of plain dense autograd. `encoder_pass` makes pre-activations, `selection` finds the few that can
be active, `activations` decodes them and has the gradients, `segment_ops` are the sums behind both, and
`triton_kernels` the same on a GPU.
"""
