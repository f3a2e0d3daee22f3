"""One training step from a batch to gradients, shared by all architectures; the loss is left to the paper.

1. x_c = x − b_dec (or x), and chunk by chunk of rows the encoder's GEMM z = W_enc x_c + bias;
2. `Architecture.select` picks the entries of z that can be active: `SparseActs`. While they would be a large part of
   all (a ReLU early in training), all of z serves instead, as `DenseActs`;
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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from sae.activation_functions import ActivationFunction
from sae.sparse.activations import Acts, DenseActs, SparseActs
from sae.sparse.encoder_pass import EncoderPass, Workspace, above, row_chunks
from sae.sparse.shards import FeatureShards

DENSE_CHUNK_BYTES = 24 * 2**20
"""Largest [rows, F] intermediate of a dense step on a CPU: blocks that the C library uses again instead of handing out
new pages."""


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
    """The loss of some tokens, with the reconstruction and the activations it was computed from."""

    loss: Tensor  # scalar, a sum over tokens
    x_hat: Tensor  # [N, d], the reconstruction that counts
    f: Tensor  # values at the entries; positive means active


class StepStats(NamedTuple):
    """Sums over the tokens of a batch; all stay on the device."""

    loss: Tensor  # scalar
    squared_error: Tensor  # scalar, Σ ‖x − x̂‖²
    fired: Tensor  # [F], tokens on which each feature was active


@dataclass(frozen=True)
class BatchShare:
    """The tokens of a batch that this process has: by default all of them."""

    weight: float = 1.0
    """How large a part of all they are."""
    aux_tokens: int | None = None
    """How many of them, the first, AuxK is estimated from; None for `AUX_TOKENS`."""
    sum_over_processes: Callable[[Sequence[Tensor]], Sequence[Tensor]] | None = None
    """Sums of tensors over all processes; None where there is one."""

    def sums(self, *tensors: Tensor) -> Sequence[Tensor]:
        """Sums over the whole batch from those over its tokens here."""
        return tensors if self.sum_over_processes is None else self.sum_over_processes(tensors)

    def mean(self, x: Tensor) -> Tensor:
        """The mean [d] over all tokens of the batch, of x [n, d] here."""
        if self.sum_over_processes is None:
            return x.mean(0)
        total, n = self.sums(x.sum(0), x.new_tensor(float(len(x))))
        return total / n


WHOLE = BatchShare()


def squared_error(x: Tensor, x_hat: Tensor) -> Tensor:
    """Σ over tokens of ‖x − x̂‖²: a scalar."""
    return (x - x_hat).square().sum()


def where_positive(value: Tensor, of: Tensor) -> Tensor:
    """The value where `of` is positive, else 0; a CPU takes ten times as long to multiply by a mask of bools."""
    return torch.ops.aten.threshold_backward(value, of, 0)


def aux_loss(z: Tensor, acts: SparseActs, error: Tensor, W_dec: Tensor, share: BatchShare = WHOLE) -> Tensor:
    """Σ‖e − ê‖² / Σ‖e − ē‖² with ê = Σ max(z, 0) W_dec over the dead features' entries; e [N, d] is a constant. The
    sum below the line is over the whole batch, so that those of several processes add up.
    """
    (variance,) = share.sums((error - share.mean(error)).square().sum())
    return squared_error(error, acts.decode(z.relu(), W_dec)) / variance.clamp(min=1e-12)


class Architecture(ABC):
    """The entries that are active, the loss, and what is saved. Holds no tensors."""

    name: ClassVar[str]
    """Name in configs and files."""
    nonlinearity: ClassVar[ActivationFunction]
    """Activation function at inference, once training is over."""
    unit_decoder: ClassVar[bool] = True
    """Whether decoder rows are held at unit norm during training."""
    subtract_b_dec: ClassVar[bool] = True
    """Whether b_dec is subtracted from the input."""
    fixed_k: ClassVar[bool] = True
    """Whether k is exact by construction; otherwise a penalty brings L0 there."""
    encoder_bias: ClassVar[str | None] = "b_enc"
    """The tensor added in z; none where the architecture adds biases itself."""
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
    revival: ClassVar[Literal["auxk", "none"]] = "auxk"
    """How dead features come back by default."""

    def extra_weights(self, n_features: int) -> dict[str, Tensor]:
        """Initial values of trained per-feature tensors beside the core ones."""
        return {}

    def extra_state(self) -> dict[str, Tensor]:
        """Initial values of tensors that follow training without gradient."""
        return {}

    @abstractmethod
    def select(self, encoder: EncoderPass, w: Weights, hyper: Hyper) -> SparseActs:
        """The entries that can be active."""

    @abstractmethod
    def loss(self, z: Tensor, acts: Acts, x: Tensor, w: Weights, hyper: Hyper) -> Losses:
        """The paper's loss, summed over the tokens of x [N, d], from z at the entries of the activations."""

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
        self,
        x: Tensor,
        w: Weights,
        hyper: Hyper,
        state: Mapping[str, Tensor],
        *,
        dead: Tensor | None = None,
        dense: bool = False,
        workspace: Workspace | None = None,
        x_read: Tensor | None = None,
        share: BatchShare = WHOLE,
        shards: FeatureShards | None = None,
    ) -> StepStats:
        """Gradients of the mean loss over x [N, d] into `.grad` of the weights; `dead` [n] are features for AuxK.

        `dense` takes whole products, which is faster while many features are active; there is no AuxK then. A
        transcoder reads `x_read` [N, r] and reconstructs x; with a weight `W_skip` [d, r], x − W_skip x_read. With
        `shards` the features are those of one process, and the gradient of b_dec is a part of the whole one.
        """
        x_c = x - w["b_dec"].detach() if self.subtract_b_dec else x
        x_c = x_c if x_read is None else x_read
        if dense:
            chunks = row_chunks(len(x), len(w["W_enc"]), x.device, cpu_bytes=DENSE_CHUNK_BYTES)
            acts = DenseActs()
            acts.shards = shards
            read = x_read is not None
            stats = [
                self._backward(acts, None, x[i], x_c[i], w, hyper, state, n_tokens=len(x), elsewhere=read, share=share)
                for i in chunks
            ]
            return StepStats(*(torch.stack(column).sum(0) for column in zip(*stats, strict=True)))
        encoder = EncoderPass(
            x_c, w["W_enc"], self.bias(w), dead=dead, k_aux=hyper.k_aux, workspace=workspace,
            aux_tokens=share.aux_tokens, shards=shards,
        )  # fmt: skip
        with torch.no_grad():
            selected, aux = self.select(encoder, w, hyper), encoder.aux_acts()
        for entries in (selected, aux):
            if entries is not None:
                entries.shards = shards
        return self._backward(
            selected, aux, x, x_c, w, hyper, state, n_tokens=len(x), elsewhere=x_read is not None,
            share=share,
        )  # fmt: skip

    def _backward(
        self,
        acts: Acts,
        aux: SparseActs | None,
        x: Tensor,
        x_c: Tensor,
        w: Weights,
        hyper: Hyper,
        state: Mapping[str, Tensor],
        *,
        n_tokens: int,
        elsewhere: bool,
        share: BatchShare,
    ) -> StepStats:
        """Gradients of what tokens x [n, d] add to the mean over a batch of `n_tokens`; `elsewhere`: x_c is what a
        transcoder reads.
        """
        b_dec = w["b_dec"] if self.subtract_b_dec and not elsewhere else None
        x = x - x_c @ w["W_skip"].T if "W_skip" in w else x
        if acts.shards is not None and not acts.shards.processes.is_first:
            w = {**w, "b_dec": w["b_dec"].detach()}  # as a part of x̂ it is the first process's
        z = acts.encode(w["W_enc"], self.bias(w), b_dec, x_c)
        loss, x_hat, f = self.loss(z, acts, x, w, hyper)
        error = (x - x_hat).detach()
        if aux is not None:
            z_aux = aux.encode(w["W_enc"], self.bias(w), b_dec, x_c[: aux.n_tokens])
            of_errors = aux_loss(z_aux, aux, error[: aux.n_tokens], w["W_dec"], share)
            loss = loss + hyper.aux_alpha * (n_tokens / share.weight) * of_errors
        (loss / n_tokens).backward()
        with torch.no_grad():
            self.observe(f, state)
            fired = acts.count_active(f)
        return StepStats(loss.detach(), error.square().sum(), fired)


class Penalised(Architecture):
    """Architectures whose active entries are those above a bound; a sparsity penalty decides how many they are."""

    fixed_k = False
    learning_rate, decay = 0.064, 0.3

    def lowest(self, w: Weights, hyper: Hyper) -> Tensor | None:
        """The z [F] above which an entry matters to the loss; None for zero."""
        return None

    def select(self, encoder: EncoderPass, w: Weights, hyper: Hyper) -> SparseActs:
        lowest = self.lowest(w, hyper)
        acts = SparseActs.concatenate([above(z) for z in encoder.chunks(lowest)])
        if lowest is not None:
            acts.z = acts.z + lowest[acts.feature]
        return acts
