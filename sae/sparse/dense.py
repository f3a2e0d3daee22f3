"""The step of an architecture while a large part of all features is active, as early in training: whole products.

Gradients are written by hand, since autograd makes a new [rows, F] tensor for every operation. Chunk by chunk of rows

1. z = W_enc x_c + bias into buffer 0;
2. `Penalised.dense` makes f of z in place and asks `DenseChunk.decode` for the error of the reconstruction: it adds to
   the gradients of W_dec and b_dec and returns ∂L/∂f in another buffer;
3. from that the architecture makes ∂L/∂z, in place, with the gradients of its own parameters;
4. ∂L/∂W_enc and the biases follow. The gradient of b_dec through the encoder is −W_encᵀ Σ_t ∂L/∂z, without a product.

Masks are float tensors or signs of values that are there anyhow: operations that mix bool and float tensors cost ten
times as much on a CPU. N tokens of the batch, n of the chunk, d width, F features; L is the mean over the batch.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sae.sparse.workspace import Workspace, add_product, linear


class DenseParts(NamedTuple):
    """What an architecture makes of a chunk."""

    dz: Tensor  # [n, F], ∂L/∂z
    penalty: Tensor  # scalar, what the loss has beside Σ ‖x − x̂‖², summed over tokens
    squared_error: Tensor  # scalar, Σ ‖x − x̂‖²
    fired: Tensor  # [F], tokens on which each feature was active


class DenseChunk:
    """Some rows of a batch: inputs, weights, buffers, and gradients that add up over the chunks."""

    def __init__(
        self, x: Tensor, w: dict[str, Tensor], gradients: dict[str, Tensor], scratch: Workspace, *, n_tokens: int
    ):
        self.x, self.w, self.gradients, self.scratch = x, w, gradients, scratch
        self.n_tokens = n_tokens  # N

    def buffer(self, number: int) -> Tensor:
        """A [n, F] buffer; z is in number 0."""
        return self.scratch.take(number, len(self.x), len(self.w["W_enc"]), self.w["W_enc"])

    def encode(self, x_c: Tensor, bias: Tensor | None) -> Tensor:
        """z [n, F] in buffer 0."""
        return linear(x_c, self.w["W_enc"], bias, out=self.buffer(0))

    def add(self, name: str, gradient: Tensor) -> None:
        """Adds to the gradient of a weight."""
        if name in self.gradients:
            self.gradients[name].add_(gradient)
        else:
            self.gradients[name] = gradient

    def add_product(self, name: str, a: Tensor, b: Tensor) -> None:
        """Adds a b to the gradient of a weight."""
        self.gradients[name] = add_product(self.gradients.get(name), a, b)

    def decode(self, f: Tensor, number: int, *, constant: bool = False) -> tuple[Tensor, Tensor]:
        """∂L/∂f [n, F] of ‖x − x̂‖², in the buffer of that number, and Σ ‖x − x̂‖²; x̂ = f W_dec + b_dec.

        `constant`: W_dec and b_dec get no gradient from it.
        """
        W_dec, b_dec = self.w["W_dec"], self.w["b_dec"]
        error = linear(f, W_dec.T, b_dec).sub_(self.x)  # [n, d]
        squared_error = error.square().sum()
        g = error.mul_(2 / self.n_tokens)
        if not constant:
            self.add_product("W_dec", f.T, g)
            self.add("b_dec", g.sum(0))
        return linear(g, W_dec, None, out=self.buffer(number)), squared_error


def positive(f: Tensor, out: Tensor) -> Tensor:
    """How many of f [n, F] are positive in each column: [F]; `out` [n, F] is overwritten where that is faster."""
    if f.device.type != "cpu":
        return (f > 0).sum(0, dtype=f.dtype)
    return torch.gt(f, 0, out=out).sum(0)


def mask_(g: Tensor, f: Tensor) -> Tensor:
    """g [n, F] where f > 0, else 0; in place."""
    return torch.ops.aten.threshold_backward.grad_input(g, f, 0, grad_input=g)
