"""QK attributions: the score of a head for two tokens as a sum over pairs of features.

Kamath et al. 2025 (transformer-circuits.pub/2025/attention-qk). Attention of layer l reads the residual stream x_t =
sum_i f_i(t) W_dec[i] + b_dec + e_t. With the scale of every norm held at its value in the run (that before the layer,
those of queries and keys), queries and keys are affine in it, position by position, rotary positions included:

    q_t = A_t x_t + a_t,    k_s = C_s x_s + c_s,    score(t, s) = scale * (q_t . k_s),

so the score, as it is before a soft cap, the mask and the softmax, is a sum over pairs

    score(t, s) = sum_i sum_j  scale * (A_t u_i(t)) . (C_s u_j(s)),

u running over the active features f_i W_dec[i], the error e, and one bias: A_t b_dec + a_t. Grouped query heads meet
the same keys.

1. One forward pass with frozen norms keeps the heads with their graph to x (`sae.model.attention`).
2. A_t and C_s are d_h vector-Jacobian products each, of all prompts at once, since prompts do not interact; a_t is
   q_t - A_t x_t. That they do not depend on x is tried.
3. Pairs are averaged over prompts by the names of their features; `than` takes the score of another key away, pair by
   pair: which features make the query look at one token rather than at another.

Legend: B examples, S positions, d model width, d_h width of a head, F features; F stands for the error, F + 1 for the
bias.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from circuits.discovery.attention.results import HeadAttention, QKAttribution, QKPair, QKTerm
from circuits.discovery.attention.tokens import check_order, token_columns
from circuits.prompts.dataset import PromptSet
from sae._progress import ProgressBar
from sae.autoencoder import SparseAutoencoder
from sae.errors import UserError
from sae.model.attention import attention_heads, heads_of
from sae.model.forward import with_gradients
from sae.model.language_model import LanguageModel
from sae.model.lrp import frozen_norms
from sae.model.sites import Site

if TYPE_CHECKING:
    from circuits.circuit import Circuit

BATCH_SIZE = 32
"""Prompts in a forward pass."""
LANE_BYTES = 2**28
"""Most that the derivatives of several entries of a query take at once."""
WORDS = 3
"""Tokens that a feature is told by."""


@dataclass(frozen=True)
class Terms:
    """The vectors whose sum is a query or a key of one example."""

    name: Tensor
    """[n] int64 feature; F for the error, F + 1 for the bias."""
    vector: Tensor
    """[n, d_h] float64, on the CPU."""
    activation: Tensor
    """[n] of features; 0 for the others."""


@dataclass(frozen=True)
class PairScores:
    """Contributions of pairs to a score, of one example or added up over some."""

    query: Tensor
    """[n] int64 feature on the query's side."""
    key: Tensor
    """[n] int64 feature on the key's side."""
    value: Tensor
    """[n] float64."""
    count: Tensor
    """[n] int64 examples in which the pair occurs."""

    @staticmethod
    def of(query: Terms, key: Terms, scale: float, *, sign: int = 1) -> PairScores:
        """All pairs of one example."""
        value = sign * scale * (query.vector @ key.vector.T)
        names = torch.meshgrid(query.name, key.name, indexing="ij")
        return PairScores(*(x.flatten() for x in (*names, value, torch.ones_like(value, dtype=torch.int64))))

    @staticmethod
    def sum(several: Iterable[PairScores]) -> PairScores:
        """Pairs of the same names added up."""
        listed = list(several)
        query, key = (torch.cat([getattr(part, name) for part in listed]) for name in ("query", "key"))
        names, entry = torch.stack([query, key]).unique(dim=1, return_inverse=True)
        value = torch.zeros(names.shape[1], dtype=torch.float64)
        value.index_add_(0, entry, torch.cat([part.value for part in listed]))
        count = torch.zeros(names.shape[1], dtype=torch.int64)
        count.index_add_(0, entry, torch.cat([part.count for part in listed]))
        return PairScores(names[0], names[1], value, count)


def read_site(model: LanguageModel, layer: int) -> Site:
    """The site whose dictionary the attention of a layer reads; UserError for a layer that is none."""
    layers = [site.layer for site in model.sites if site.kind == "attn"]
    if layer not in layers:
        raise UserError(f"layer is {layer}: layers with attention are {', '.join(map(str, layers)) or 'none'}")
    return Site("resid", layer - 1) if layer else Site("embed")


def qk_attribution(
    circuit: Circuit,
    prompts: PromptSet | None = None,
    *,
    layer: int,
    head: int,
    query: str,
    key: str,
    than: str | None = None,
    progress: bool = True,
) -> QKAttribution:
    """Split the pre-softmax score of a head for two tokens over pairs of features, errors and biases.

    score(t, s) = scale * (q_t . k_s) = sum_ij scale * (A_t u_i(t)) . (C_s u_j(s)) with norms frozen (Kamath et al.
    2025); see `circuits.discovery.attention.qk` for the terms.

    Args:
        circuit: The circuit, of which the model and the SAEs are used.
        prompts: The prompts, whose clean side is read; those the circuit was found on by default.
        layer: Layer of the attention, from 0; it reads `resid` of the layer before, or `embed`.
        head: Number of the head, from 0.
        query: The token that looks: a span, an index, `last`, or a word.
        key: The token that is looked at.
        than: Another one, whose score is taken away pair by pair; None to explain the score itself.
        progress: Whether to show a progress bar.

    Returns:
        The mean score over prompts, its pairs, and their sums for each feature of the query's and of the key's side.

    Raises:
        UserError: No such head or token, no autoencoder where the layer reads, or attention whose scores are more than
            queries times keys, or are not affine in the residual stream once norms are frozen.
    """
    prompts = circuit.prompts if prompts is None else prompts
    model, site = circuit.model, read_site(circuit.model, layer)
    if site not in circuit.saes:
        raise UserError(f"attention of layer {layer} reads {site}, where this circuit has no autoencoder")
    sae = circuit.saes[site]
    columns, prompts, left_out = _columns(model, prompts, [query, key, *([] if than is None else [than])])
    sums: list[PairScores] = []
    words = Words(), Words()  # of the query's side and of the key's
    totals = torch.zeros(2, 2, dtype=torch.float64)  # score and weight, of key and of than
    softcap = None
    with ProgressBar(total=len(prompts), desc="scores", unit="prompt", disable=not progress) as bar:
        for batch, of_batch in _batches(prompts, columns):
            result = _batch(model, sae, batch, site, layer, head, of_batch)
            sums.append(PairScores.sum(result.pairs))
            for number, of_column in enumerate(result.terms):
                ids = batch.clean.input_ids.gather(1, of_batch[:, number : number + 1])[:, 0]
                words[min(number, 1)].add(ids, of_column)
            totals += result.totals
            softcap = result.softcap
            bar.update(len(batch))
    pairs, n = PairScores.sum(sums), len(prompts)
    (score, weight), (other_score, other_weight) = (totals / n).tolist()
    return QKAttribution(
        layer=layer, head=head, site=site.name, query=query, key=key, than=than, n_prompts=n, left_out=left_out,
        score=score - other_score, weight=weight, than_weight=None if than is None else other_weight, softcap=softcap,
        pairs=_named_pairs(pairs, site, sae, n),
        queries=_marginals(pairs, pairs.query, site, sae, n, words[0].texts(model)),
        keys=_marginals(pairs, pairs.key, site, sae, n, words[1].texts(model)),
    )  # fmt: skip


def heads_looking(
    circuit: Circuit, prompts: PromptSet | None = None, *, query: str, key: str, than: str | None = None
) -> list[HeadAttention]:
    """The mean attention of every head from one token to another, the largest first (with `than`: where more of it goes
    to the key than to that token); arguments as in `qk_attribution`.
    """
    model, prompts = circuit.model, circuit.prompts if prompts is None else prompts
    columns, prompts, _ = _columns(model, prompts, [query, key, *([] if than is None else [than])])
    totals: dict[int, Tensor] = {}
    with torch.no_grad():
        for batch, of_batch in _batches(prompts, columns):
            rows, *others = of_batch.T
            example = torch.arange(len(batch), device=rows.device)
            with attention_heads(model.hf) as heads:
                model.run(batch.clean, capture=[model.sites[-1]], need_logits=False)
            heads_of(heads, min(heads, default=0), model.name)
            for layer, of_layer in heads.items():
                weights = of_layer.weights.to(model.device)
                to = [weights[example, :, rows, column].cpu().double().sum(0) for column in others]  # [H] each
                totals[layer] = totals.get(layer, torch.zeros(())) + torch.stack(to)
    rows = [
        HeadAttention(layer, head, *(value / len(prompts) for value in of_head))
        for layer, total in sorted(totals.items())
        for head, of_head in enumerate(total.T.tolist())
    ]
    return sorted(rows, key=lambda row: -(row.weight - (row.than_weight or 0.0)))


def _columns(model: LanguageModel, prompts: PromptSet, names: list[str]) -> tuple[Tensor, PromptSet, int]:
    """Columns [B, n] of the tokens in the prompts that have them all, these prompts, and how many were left out."""
    columns = torch.stack([token_columns(model, prompts, name) for name in names], dim=1)
    for index, name in enumerate(names[1:], start=1):
        check_order(columns[:, 0], columns[:, index], (names[0], name))
    has_all = (columns >= 0).all(1)
    if not bool(has_all.any()):
        raise UserError(f"no prompt has all of the tokens {', '.join(names)}")
    before = prompts.clean.n_positions
    chosen = prompts[has_all]
    return columns[has_all] - (before - chosen.clean.n_positions), chosen, int((~has_all).sum())


def _batches(prompts: PromptSet, columns: Tensor) -> Iterator[tuple[PromptSet, Tensor]]:
    """Slices of the prompts, padded each to its own longest, with the columns [B, n] in them."""
    for start in range(0, len(prompts), BATCH_SIZE):
        batch = prompts[start : start + BATCH_SIZE]
        shift = prompts.clean.n_positions - batch.clean.n_positions
        yield batch, columns[start : start + BATCH_SIZE] - shift


@dataclass(frozen=True)
class _BatchScores:
    """The sums that one batch adds."""

    pairs: list[PairScores]
    totals: Tensor  # [2, 2] score and weight, added up over prompts, of the key and of the other one
    softcap: float | None
    terms: list[list[Terms]]  # of the query, the key and the other key, each of every example


@with_gradients
def _batch(
    model: LanguageModel, sae: SparseAutoencoder, prompts: PromptSet, site: Site, layer: int, head: int, columns: Tensor
) -> _BatchScores:
    """Pairs of every example of a batch; columns: [B, 2 or 3] of the query, the key and the other key."""
    with attention_heads(model.hf) as by_layer, frozen_norms(model.hf):
        x = model.run(prompts.clean, capture=[site, Site("attn", layer)], grad=True, need_logits=False).activations[
            site
        ]
    heads = heads_of(by_layer, layer, model.name).to(model.device)
    if not 0 <= head < heads.n_heads:
        raise UserError(f"head is {head}: attn_{layer} has heads 0 to {heads.n_heads - 1}")
    name, rows = f"attn_{layer} of model {model.name!r}", columns[:, 0]
    heads.check(head, rows, name)
    measured = heads.scores(head, rows), heads.weights_at(head, rows)
    queries = terms(heads.query[:, head], x, rows, sae, f"queries of {name}")
    pairs, totals, of_tokens = [], torch.zeros(2, 2, dtype=torch.float64), [queries]
    for index, column in enumerate(columns.T[1:]):
        keys = terms(heads.key_of(head), x, column, sae, f"keys of {name}")
        of_tokens.append(keys)
        sign = 1 if index == 0 else -1
        pairs += [PairScores.of(q, k, heads.scale, sign=sign) for q, k in zip(queries, keys, strict=True)]
        for n, values in enumerate(measured):
            totals[index, n] = values.gather(1, column[:, None].cpu()).sum()
    return _BatchScores(pairs, totals, heads.softcap, of_tokens)


def terms(states: Tensor, x: Tensor, column: Tensor, sae: SparseAutoencoder, name: str) -> list[Terms]:
    """The terms of each example's query or key.

    Args:
        states: [B, S, d_h] queries or keys, with their graph to x.
        x: [B, S, d] the residual stream.
        column: [B] position of each example.
        sae: the dictionary of x.
        name: what the states are, for errors.
    """
    example = torch.arange(len(column), device=column.device)
    chosen = states[example, column]  # [B, d_h]
    _check_affine(chosen, x, column, name)
    matrix = _jacobian(chosen, x, column).cpu().double()  # [B, d_h, d]
    x_at = x[example, column].detach()
    f = sae.encode(x_at.to(sae.W_dec)).cpu().double()  # [B, F]
    b_dec, others = sae.b_dec.cpu().double(), torch.tensor([len(sae.W_dec), len(sae.W_dec) + 1])
    result = []
    for of_example, x_one, A, state in zip(f, x_at.cpu().double(), matrix, chosen.detach().cpu().double(), strict=True):
        active = of_example.nonzero()[:, 0]
        written = of_example[active, None] * sae.W_dec[active.to(sae.device)].cpu().double()  # [n, d]
        error = x_one - written.sum(0) - b_dec
        vectors = torch.cat([written, error[None], b_dec[None]]) @ A.T  # [n + 2, d_h]
        vectors[-1] += state - A @ x_one
        activation = torch.cat([of_example[active], torch.zeros(2, dtype=of_example.dtype)])
        result.append(Terms(torch.cat([active, others]), vectors, activation))
    return result


def _jacobian(chosen: Tensor, x: Tensor, column: Tensor) -> Tensor:
    """[B, d_h, d] derivatives of states [B, d_h] with respect to x [B, S, d] at each example's column [B]."""
    example = torch.arange(len(column), device=column.device)
    entries = torch.eye(chosen.shape[1], dtype=chosen.dtype, device=chosen.device)
    lanes = max(1, LANE_BYTES // (4 * x.numel() * x.element_size()))  # queries, keys and values are as wide as x each
    rows = []
    for some in entries.split(lanes):
        directions = some[:, None].expand(-1, len(column), -1)  # [R, B, d_h]
        (gradient,) = torch.autograd.grad(chosen, x, directions, retain_graph=True, is_grads_batched=True)
        rows.append(gradient[:, example, column])
    return torch.cat(rows).movedim(0, 1)


def _check_affine(chosen: Tensor, x: Tensor, column: Tensor, name: str) -> None:
    """UserError unless states [B, d_h] are affine in x [B, S, d] at their own columns, and read no other ones."""
    weight = torch.linspace(-1, 1, chosen.shape[1], dtype=chosen.dtype, device=chosen.device)
    (gradient,) = torch.autograd.grad((chosen @ weight).sum(), x, create_graph=True)
    elsewhere = gradient.detach().abs().sum(-1)
    elsewhere[torch.arange(len(column), device=column.device), column] = 0
    again = None
    if gradient.requires_grad:
        direction = torch.linspace(-1, 1, x.shape[-1], dtype=x.dtype, device=x.device)
        (again,) = torch.autograd.grad((gradient @ direction).sum(), x, retain_graph=True, allow_unused=True)
    if bool((elsewhere > 0).any()) or (again is not None and bool((again != 0).any())):
        raise UserError(
            f"{name} are not affine in the residual stream of their own token once norms are frozen: their scores "
            "cannot be split over pairs of features"
        )


# ---- names


def _name(site: Site, sae: SparseAutoencoder, feature: int) -> str:
    return f"{site}/{ {len(sae.W_dec): 'error', len(sae.W_dec) + 1: 'bias'}.get(feature, feature) }"


def _named_pairs(pairs: PairScores, site: Site, sae: SparseAutoencoder, n: int) -> list[QKPair]:
    order = pairs.value.abs().argsort(descending=True, stable=True)
    columns = (pairs.query[order], pairs.key[order], pairs.value[order] / n, pairs.count[order] / n)
    rows = zip(*(column.tolist() for column in columns), strict=True)
    return [QKPair(_name(site, sae, q), _name(site, sae, k), value, share) for q, k, value, share in rows]


def _marginals(
    pairs: PairScores, side: Tensor, site: Site, sae: SparseAutoencoder, n: int, words: Mapping[int, list[str]]
) -> list[QKTerm]:
    """Sums of the pairs by their feature on one side, [pairs], over n prompts."""
    names, entry = side.unique(return_inverse=True)
    total = torch.zeros(len(names), dtype=torch.float64).index_add_(0, entry, pairs.value) / n
    order = total.abs().argsort(descending=True, stable=True)
    rows = zip(names[order].tolist(), total[order].tolist(), strict=True)
    return [QKTerm(_name(site, sae, feature), value, words.get(feature, [])) for feature, value in rows]


class Words:
    """The tokens at which features are active, with the sum of their activations."""

    def __init__(self) -> None:
        self.activation: defaultdict[int, Counter[int]] = defaultdict(Counter)

    def add(self, ids: Tensor, terms: Sequence[Terms]) -> None:
        """Add the terms at one token of each example; ids: [B]."""
        for id, of_example in zip(ids.tolist(), terms, strict=True):
            for feature, value in zip(of_example.name.tolist(), of_example.activation.tolist(), strict=True):
                if value:
                    self.activation[feature][id] += value

    def texts(self, model: LanguageModel) -> dict[int, list[str]]:
        """Feature -> the tokens it is strongest on, as text."""
        return {
            feature: model.token_strings([id for id, _ in of_feature.most_common(WORDS)])
            for feature, of_feature in self.activation.items()
        }
