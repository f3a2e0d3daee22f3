"""What all architectures share: one training step from a batch to gradients, with the loss left to the paper.

1. x_c = x − b_dec (or x), and chunk by chunk of rows the encoder's GEMM z = W_enc x_c + bias;
2. `Architecture.select` keeps the entries of z that can be active: a `SparseActs`. Where that would be a large part of
   all (a ReLU early in training), the rest is done with whole products, by `Penalised.dense` and `sae.sparse.dense`;
3. `Architecture.loss` is the paper's loss of these entries, in plain autograd;
4. AuxK (Gao et al. 2024, section 2.4 and appendix A.2): the k_aux largest pre-activations of dead features reconstruct
   the error e = x − x̂; its loss ‖e − ê‖² is normalised by the variance of e and added with weight alpha. It is
   estimated from the first `AUX_TOKENS` tokens of the (shuffled) batch, for it costs more than all the rest;
5. backward: gradients are in `.grad` of the weights, statistics are returned as tensors, nothing is synchronised.

Inputs are centred and scaled to unit mean squared norm, so that a mean ‖x − x̂‖² is close to the unexplained variance
and learning rates and penalties mean the same at every site of every model. N tokens, d width, F features.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sae.activation_functions import ActivationFunction
from sae.sparse.activations import SparseActs
from sae.sparse.dense import DenseChunk, DenseParts
from sae.sparse.selection import Entries, above, concatenate, top_k
from sae.sparse.workspace import Workspace, linear, row_chunks

AUX_TOKENS = 512
"""Tokens of a batch on which dead features reconstruct the error."""

Weights = Mapping[str, Tensor]
"""Trained tensors by name: W_enc [F, d], b_enc [F], W_dec [F, d], b_dec [d] and the architecture's own [F]."""


@dataclass(frozen=True)
class Hyper:
    """The hyperparameters in force at one step."""

    k: int
    """Active features a token."""
    sparsity: Tensor | float = 0.0
    """Weight of the sparsity penalty, already warmed up."""
    p: float = 1.0
    """Exponent of the penalty where it is annealed."""
    bandwidth: float = 0.001
    """Width of the kernel of straight-through gradients."""
    target_l0: float | None = None
    """Active features a token that JumpReLU's quadratic penalty wants; None for a penalty on L0 itself."""
    k_aux: int = 0
    """Dead features a token that reconstruct the error; 0 for no auxiliary loss."""
    aux_alpha: float = 1 / 32
    """Weight of the auxiliary loss."""


class Losses(NamedTuple):
    """What an architecture makes of the entries."""

    loss: Tensor  # scalar, a sum over tokens
    x_hat: Tensor  # [N, d], the reconstruction that counts
    f: Tensor  # values at the entries; positive means active


class StepStats(NamedTuple):
    """Sums over the tokens of a batch; all stay on the device."""

    loss: Tensor  # scalar
    squared_error: Tensor  # scalar, Σ ‖x − x̂‖²
    fired: Tensor  # [F], tokens on which each feature was active


class Encoder:
    """The encoder's pass over a batch; picks the AuxK entries on the way."""

    def __init__(
        self, x_c: Tensor, W_enc: Tensor, bias: Tensor | None, *, dead: Tensor | None = None, k_aux: int = 0,
        scratch: Workspace | None = None,
    ):  # fmt: skip
        self.scratch = scratch or Workspace()
        self.x_c, self.W_enc, self.bias = x_c, W_enc.detach(), None if bias is None else bias.detach()
        self.dead = dead  # [n_dead] indices, sorted
        self.k_aux = 0 if dead is None else min(k_aux, len(dead))
        self._aux: list[tuple[Tensor, Tensor]] = []

    def chunks(self, lowest: Tensor | None = None) -> Iterator[tuple[int, Tensor]]:
        """(first row, z [rows, F]) over the batch; z − lowest if it is given, at no cost. A z lasts until the next.

        Under autocast z has its dtype; `SparseActs.encode` gives what was selected the weights' dtype again.
        """
        self._aux = []
        bias = self.bias
        if lowest is not None:
            bias = -lowest if bias is None else bias - lowest
        for rows in row_chunks(len(self.x_c), len(self.W_enc), self.x_c.device):
            x_c = self.x_c[rows]
            if torch.is_autocast_enabled(x_c.device.type):  # half as many bytes for what selects from z
                z = F.linear(x_c, self.W_enc, bias)
            else:
                z = linear(x_c, self.W_enc, bias, out=self.scratch.take(0, len(x_c), len(self.W_enc), self.W_enc))
            if self.k_aux and self.dead is not None and rows.start < AUX_TOKENS:
                dead_z = z[: AUX_TOKENS - rows.start, self.dead]  # [n, n_dead]
                dead_z = dead_z if lowest is None else dead_z + lowest[self.dead]
                value, index = top_k(dead_z, self.k_aux)
                self._aux.append((value, self.dead[index]))
            yield rows.start, z

    def aux_code(self) -> SparseActs | None:
        """The AuxK entries of the last pass."""
        if not self._aux:
            return None
        value, feature = (torch.cat(column) for column in zip(*self._aux, strict=True))
        return SparseActs.fixed(feature, value, len(self.W_enc))


class Architecture(ABC):
    """A recipe: which entries are active, what the loss is, and what is saved. Holds no tensors."""

    name: ClassVar[str]
    """Name in configs and files."""
    nonlinearity: ClassVar[ActivationFunction]
    """What encoding does once training is over."""
    unit_decoder: ClassVar[bool] = True
    """Whether decoder rows are held at unit norm during training."""
    subtract_b_dec: ClassVar[bool] = True
    """Whether b_dec is subtracted from the input."""
    fixed_k: ClassVar[bool] = True
    """Whether k is exact by construction; otherwise a penalty brings L0 there."""
    encoder_bias: ClassVar[str | None] = "b_enc"
    """The tensor added in z; none where the architecture adds biases itself."""
    may_be_dense: ClassVar[bool] = False
    """Whether a large part of all features can be active, so that there is a dense step too."""
    n_buffers: ClassVar[int] = 1
    """[rows, F] buffers that its steps use at most."""
    n_levels: ClassVar[int] = 1
    """Reconstructions that its loss compares with the input."""
    widest: ClassVar[int] = 1
    """Entries a token that the loss uses, as a multiple of k."""
    trained: ClassVar[bool] = True
    """Whether there is anything to train."""
    decoder_norm: ClassVar[float] = 1.0
    """Norm of decoder and encoder rows at the start."""
    learning_rate: ClassVar[float] = 0.048
    """Peak learning rate times √width, by default."""
    decay: ClassVar[float] = 0.6
    """Share of the steps over which the learning rate falls, by default."""
    rates: ClassVar[Mapping[str, float]] = {}
    """Factors on the learning rate, by the tensor they are for."""
    damping: ClassVar[float] = 1.0
    """How much a falling L0 takes from a steered weight of the penalty (`sae.training.training_sae`)."""
    weak: ClassVar[float] = 1.0
    """Activation whose penalty stays the same when the exponent falls and the weight is steered."""
    revival: ClassVar[str] = "auxk"
    """What brings dead features back by default: auxk or none."""

    def own_weights(self, n_features: int) -> dict[str, Tensor]:
        """Initial values of trained per-feature tensors beside the core ones."""
        return {}

    def own_state(self) -> dict[str, Tensor]:
        """Initial values of tensors that follow training without gradient."""
        return {}

    @abstractmethod
    def select(self, encoder: Encoder, w: Weights, hyper: Hyper) -> SparseActs:
        """The entries that can be active."""

    @abstractmethod
    def loss(self, z: Tensor, code: SparseActs, x: Tensor, w: Weights, hyper: Hyper) -> Losses:
        """The paper's loss, summed over the tokens of x [N, d], from z at the entries of the code."""

    def observe(self, f: Tensor, state: Mapping[str, Tensor]) -> None:  # noqa: B027
        """Updates the architecture's state from f at the entries; called without gradients. Most have none."""

    def constrain(self, w: Weights) -> None:  # noqa: B027
        """Brings its own weights back into their range after an optimizer step. Most need nothing."""

    def rescaling(self, x: Tensor, w: Weights, hyper: Hyper, following: Hyper) -> Tensor | float:
        """Factor on a fixed weight of the penalty from one step to the next, whose penalty may be another one."""
        return 1.0

    def export(self, w: Weights, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors that `SparseAutoencoder` needs."""
        return {name: tensor.detach() for name, tensor in w.items()}

    def bias(self, w: Weights) -> Tensor | None:
        """The tensor added in z."""
        return None if self.encoder_bias is None else w[self.encoder_bias]

    def step(
        self, x: Tensor, w: Weights, hyper: Hyper, state: Mapping[str, Tensor], *,
        dead: Tensor | None = None, dense: bool = False, scratch: Workspace | None = None,
    ) -> StepStats:  # fmt: skip
        """Gradients of the mean loss over x [N, d] into `.grad` of the weights; `dead` [n] are features for AuxK."""
        x_c = x - w["b_dec"].detach() if self.subtract_b_dec else x
        scratch = scratch or Workspace()
        if dense:
            return self.dense_step(x, x_c, w, hyper, scratch)
        encoder = Encoder(x_c, w["W_enc"], self.bias(w), dead=dead, k_aux=hyper.k_aux, scratch=scratch)
        with torch.no_grad():
            sparse = self.select(encoder, w, hyper)
        return self._backward(sparse, encoder.aux_code(), x, x_c, w, hyper, state, n_tokens=len(x))

    def dense_step(self, x: Tensor, x_c: Tensor, w: Weights, hyper: Hyper, scratch: Workspace) -> StepStats:
        """The same by whole products, where `may_be_dense`."""
        raise NotImplementedError(f"{self.name} has no dense step")

    def _backward(
        self, code: SparseActs, aux: SparseActs | None, x: Tensor, x_c: Tensor, w: Weights, hyper: Hyper,
        state: Mapping[str, Tensor], *, n_tokens: int,
    ) -> StepStats:  # fmt: skip
        z = self._encode(code, x_c, w)
        loss, x_hat, f = self.loss(z, code, x, w, hyper)
        error = (x - x_hat).detach()
        if aux is not None:
            z_aux = self._encode(aux, x_c[: aux.n_tokens], w)
            loss = loss + hyper.aux_alpha * n_tokens * aux_loss(z_aux, aux, error[: aux.n_tokens], w["W_dec"])
        (loss / n_tokens).backward()
        with torch.no_grad():
            self.observe(f, state)
            fired = code.sum_tokens((f > 0).to(f.dtype))
        return StepStats(loss.detach(), error.square().sum(), fired)

    def _encode(self, code: SparseActs, x_c: Tensor, w: Weights) -> Tensor:
        b_dec = w["b_dec"] if self.subtract_b_dec else None
        return code.encode(w["W_enc"], self.bias(w), b_dec, x_c)


class Penalised(Architecture):
    """Architectures whose active entries are those above a bound; a sparsity penalty decides how many they are."""

    fixed_k = False
    learning_rate, decay = 0.064, 0.3
    may_be_dense = True
    n_buffers = 2

    def lowest(self, w: Weights, hyper: Hyper) -> Tensor | None:
        """The z [F] above which an entry matters to the loss; None for zero."""
        return None

    def select(self, encoder: Encoder, w: Weights, hyper: Hyper) -> SparseActs:
        lowest = self.lowest(w, hyper)
        starts, parts = zip(*((start, above(z)) for start, z in encoder.chunks(lowest)), strict=True)
        entries = concatenate(list(parts), list(starts))
        z = entries.z if lowest is None else entries.z + lowest[entries.feature]
        return sparse_code(Entries(entries.token, entries.feature, z), encoder)

    @abstractmethod
    def dense(self, z: Tensor, chunk: DenseChunk, w: Weights, hyper: Hyper) -> DenseParts:
        """The gradient of the loss where most of z [n, F] is active, in place; see `sae.sparse.dense`."""

    @torch.no_grad()
    def dense_step(self, x: Tensor, x_c: Tensor, w: Weights, hyper: Hyper, scratch: Workspace) -> StepStats:
        weights, w = w, {name: tensor.detach() for name, tensor in w.items()}
        gradients: dict[str, Tensor] = {}
        stats = []
        for rows in row_chunks(len(x), len(w["W_enc"]), x.device):
            chunk = DenseChunk(x[rows], w, gradients, scratch, n_tokens=len(x))
            parts = self.dense(chunk.encode(x_c[rows], self.bias(w)), chunk, w, hyper)
            chunk.add_product("W_enc", parts.dz.T, x_c[rows])
            dz_sum = parts.dz.sum(0)
            if self.encoder_bias is not None:
                chunk.add(self.encoder_bias, dz_sum)
            if self.subtract_b_dec:
                chunk.add("b_dec", -(dz_sum @ w["W_enc"]))
            stats.append(StepStats(parts.squared_error + parts.penalty, parts.squared_error, parts.fired))
        for name, gradient in gradients.items():
            before = weights[name].grad
            weights[name].grad = gradient if before is None else before + gradient
        return StepStats(*(torch.stack(column).sum(0) for column in zip(*stats, strict=True)))


def sparse_code(entries: Entries, encoder: Encoder) -> SparseActs:
    """Entries of a whole batch as a code."""
    return SparseActs(*entries, n_tokens=len(encoder.x_c), n_features=len(encoder.W_enc))


def squared_error(x: Tensor, x_hat: Tensor) -> Tensor:
    """Σ over tokens of ‖x − x̂‖²: a scalar."""
    return (x - x_hat).square().sum()


def aux_loss(z: Tensor, code: SparseActs, error: Tensor, W_dec: Tensor) -> Tensor:
    """Σ‖e − ê‖² / Σ‖e − ē‖² with ê = Σ max(z, 0) W_dec over the dead features' entries; e [N, d] is a constant."""
    variance = (error - error.mean(0)).square().sum()
    return squared_error(error, code.decode(z.relu(), W_dec)) / variance.clamp(min=1e-12)
