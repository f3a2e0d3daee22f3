"""Which features of one dictionary make which others come next, in the text and by the model's own predictions.

1. In the text, feature A at a token *raises* B at the next by

       T[A, B] = (E[f_B(t+1) | f_A(t) > 0] − E[f_B(t+1)]) / max f_B

   over pairs of tokens that follow each other. Its standard error is clustered by text:

       u_g = Σ_{t in text g} a_t (f_B(t+1) − m_A) / n_A − (f_B(t+1) − m) / P,   error² = G/(G − 1) Σ_g u_g²

   with a_t = 1 where A fires, n_A = Σ a_t, m_A and m the two means above.
2. Chance: z[A, B] = T √n_A / σ_B, σ_B the standard deviation of f_B, must exceed that of every pair of features after
   the next tokens are shuffled.
3. By the model: A's share of the residual stream, f_A(t) W_dec[A], is taken away at t alone, on a sample of the tokens
   where A fires. With Δp_A(v) = p(v | x) − p(v | x − f_A W_dec[A]) the probability that A gives the next token v, A's
   *effect* on B is, to first order in what the next token alone says of B,

       M[A, B] = Σ_v Δp_A(v) E[f_B | token v] / max f_B

   with E[f_B] for tokens that the text lacks. Its error is over the sample. Two features may follow each other in the
   text without M: then the model's predictions do not go through A.

Shapes: N tokens, P pairs of tokens, F features, G texts, K transitions, V vocabulary, R contexts in the sample.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from sae.autoencoder import SparseAutoencoder
from sae.data.batches import LOGIT_BYTES
from sae.features.reading import Reading
from sae.model.language_model import LanguageModel
from sae.model.sites import Site
from sae.model.tokens import Tokens

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

    Array: TypeAlias = "np.ndarray[Any, np.dtype[Any]]"

MIN_FIRES, MOST_FIRES, MIN_TEXTS = 30, 0.25, 10
"""Tokens on which a feature must fire, the share of all on which it may, and texts it must fire in."""
LEAST_RAISED = 0.1
"""What T must exceed, in units of B's maximum, by the lower end of its interval."""
LEAST_EFFECT = 0.02
"""What M must exceed, likewise."""
SHUFFLES = 5
MOST_TRANSITIONS = 1000
"""Transitions of a site that are tested by the model, those with the largest T."""
CONTEXTS = 32
"""Contexts of a feature that it is taken away in."""
BATCH_TOKENS = 8192
BLOCK = 256
"""Features whose followers are counted at once."""
CARRIERS = 3
"""Tokens that are named."""
Z = 1.96


@dataclass(frozen=True)
class Transition:
    """Feature A at a token raises B at the next."""

    source: int
    """A."""
    target: int
    """B."""
    count: int
    """Tokens with a next one on which A fires."""
    raised: float
    """T."""
    raised_error: float
    """Standard error of T."""
    effect: float
    """M."""
    effect_error: float
    """Standard error of M."""
    token_ids: list[int]
    """Next tokens that carry most of M."""

    @property
    def is_of_model(self) -> bool:
        """Whether the model's predictions raise B because of A."""
        return self.effect - Z * self.effect_error >= LEAST_EFFECT


def transitions_of(
    model: LanguageModel, site: Site, sae: SparseAutoencoder, reading: Reading, *, seed: int = 0
) -> list[Transition]:
    """The transitions at a site that are above chance and threshold in the text, largest T first, each with the
    model's part in it; sample and shuffles are drawn with the seed.
    """
    from scipy.sparse import csr_matrix

    f, text = reading.features[site], reading.text.numpy()
    shape = (reading.n_tokens, sae.config.n_features)
    active = csr_matrix((f.value.double().numpy(), (f.token.numpy(), f.feature.numpy())), shape=shape)
    follows = (reading.text[1:] == reading.text[:-1]) & (reading.position[1:] == reading.position[:-1] + 1)
    first = follows.numpy().nonzero()[0]  # [P] where pairs begin
    usable = usable_features(active, text)
    active = active[:, usable]
    draw = np.random.default_rng(seed)
    edges, raised, error = raised_in_text(active[first] != 0, _scaled(active)[first + 1], text[first], draw)
    if not len(edges):
        return []
    effect, effect_error, carriers = _effects(model, site, sae, reading, active, usable, edges, draw)
    count = np.bincount((active[first] != 0).nonzero()[1], minlength=len(usable))
    return [
        Transition(
            int(usable[a]), int(usable[b]), int(count[a]), float(raised[i]), float(error[i]), float(effect[i]),
            float(effect_error[i]), carriers[i],
        )
        for i, (a, b) in enumerate(edges)
    ]  # fmt: skip


def usable_features(active: csr_matrix, text: Array) -> Array:
    """Features of activations [N, F] that fire neither too rarely, nor too often, nor in too few texts."""
    from scipy.sparse import csr_matrix

    fires = np.bincount(active.indices, minlength=active.shape[1])
    of_text = csr_matrix((np.ones(len(text)), (text, np.arange(len(text)))))
    texts = np.bincount((of_text @ (active != 0)).nonzero()[1], minlength=active.shape[1])
    return np.flatnonzero((fires >= MIN_FIRES) & (fires <= MOST_FIRES * active.shape[0]) & (texts >= MIN_TEXTS))


def _scaled(active: csr_matrix) -> csr_matrix:
    """Activations [N, F] in units of each feature's maximum."""
    from scipy.sparse import diags

    return (active @ diags(1 / np.maximum(active.max(0).toarray().ravel(), 1e-30))).tocsr()


def raised_in_text(
    fired: csr_matrix, following: csr_matrix, text: Array, draw: np.random.Generator
) -> tuple[Array, Array, Array]:
    """Transitions above chance and threshold, [K, 2], with T and its error, largest T first.

    fired: [P, F] whether each feature is on; following: [P, F] features at the next token; text: [P] of which text.
    """
    fired = fired.astype(np.float64).tocsc()
    shuffled = (following[draw.permutation(following.shape[0])] for _ in range(SHUFFLES))
    chance = max((z.max(initial=0) for rows in shuffled for *_, z in _blocks(fired, rows)), default=0)
    rows, columns, raised = [], [], []
    for row, column, T, z in _blocks(fired, following):
        large = (z > chance) & (T >= LEAST_RAISED)
        rows.append(row[large])
        columns.append(column[large])
        raised.append(T[large])
    if not sum(map(len, rows)):
        return np.zeros((0, 2), dtype=int), np.zeros(0), np.zeros(0)
    edges, T = np.stack([np.concatenate(rows), np.concatenate(columns)], axis=1), np.concatenate(raised)
    order = np.argsort(-T, kind="stable")
    edges, T = edges[order], T[order]
    error = _errors(fired, following.tocsc(), text, edges)
    large = np.flatnonzero(T - Z * error >= LEAST_RAISED)[:MOST_TRANSITIONS]
    return edges[large], T[large], error[large]


def _blocks(fired: csr_matrix, following: csr_matrix) -> Iterator[tuple[Array, Array, Array, Array]]:
    """A, B, T and z of all pairs of features that ever follow each other, a block of A at a time."""
    n = np.asarray(fired.sum(0)).ravel()
    mean = np.asarray(following.mean(0)).ravel()
    spread = np.sqrt(np.maximum(np.asarray(following.multiply(following).mean(0)).ravel() - mean**2, 1e-30))
    for start in range(0, fired.shape[1], BLOCK):
        sums = (fired[:, start : start + BLOCK].T @ following).tocoo()
        row, column = sums.row + start, sums.col
        T = sums.data / n[row] - mean[column]
        yield row, column, T, T * np.sqrt(n[row]) / spread[column]


def _errors(fired: csr_matrix, following: csr_matrix, text: Array, edges: Array) -> Array:
    """The standard errors of T [K], clustered by text."""
    from scipy.sparse import csr_matrix

    number = np.unique(text, return_inverse=True)[1]
    of_text = csr_matrix((np.ones(len(text)), (number, np.arange(len(text)))))  # [G, P]
    G, P = of_text.shape
    tokens = np.asarray(of_text.sum(1))  # [G, 1]
    n = np.asarray(fired.sum(0)).ravel()
    errors = []
    for block in np.array_split(edges, max(1, len(edges) // BLOCK)):
        A, B = fired[:, block[:, 0]], following[:, block[:, 1]]  # [P, k]
        both = (of_text @ A.multiply(B).tocsc()).toarray()  # [G, k]
        n_A, m_A = n[block[:, 0]], both.sum(0) / n[block[:, 0]]
        sum_B = (of_text @ B).toarray()
        u = (both - m_A * (of_text @ A).toarray()) / n_A - (sum_B - sum_B.sum(0) / P * tokens) / P
        errors.append(np.sqrt(G / max(G - 1, 1) * (u**2).sum(0)))
    return np.concatenate(errors)


def _effects(
    model: LanguageModel, site: Site, sae: SparseAutoencoder, reading: Reading, active: csr_matrix, usable: Array,
    edges: Array, draw: np.random.Generator,
) -> tuple[Array, Array, list[list[int]]]:  # fmt: skip
    """M [K], its error [K] and the tokens that carry most of it, of transitions [K, 2] of activations [N, F]."""
    from scipy.sparse import csr_matrix

    n, V = reading.n_tokens, model.vocab_size
    of_token = csr_matrix((np.ones(n), (reading.token_ids.numpy(), np.arange(n))), shape=(V, n))
    seen = np.asarray(of_token.sum(1)).ravel()
    targets, column = np.unique(edges[:, 1], return_inverse=True)
    scaled = _scaled(active)[:, targets]
    by_token = csr_matrix((1 / np.maximum(seen, 1), (np.arange(V), np.arange(V)))) @ (of_token @ scaled)  # [V, targets]
    mean = np.asarray(scaled.mean(0)).ravel()
    by_column = active.tocsc()
    effect, error, carriers = np.zeros(len(edges)), np.zeros(len(edges)), [list[int]() for _ in edges]
    sources = np.unique(edges[:, 0])
    at_once = max(1, LOGIT_BYTES // (8 * V * CONTEXTS))
    for block in np.split(sources, range(at_once, len(sources), at_once)):
        rows = [_sample(by_column[:, a], draw) for a in block]
        directions = sae.W_dec[torch.from_numpy(usable[np.repeat(block, [len(tokens) for tokens, _ in rows])])]
        removed = directions * torch.from_numpy(np.concatenate([values for _, values in rows])).to(directions)[:, None]
        of_block = _gained(model, site, removed, reading, np.concatenate([tokens for tokens, _ in rows]))
        for a, gained in zip(
            block, np.split(of_block, np.cumsum([len(tokens) for tokens, _ in rows])[:-1]), strict=True
        ):
            # A token that the text lacks says nothing of B: there f_B is taken to be as anywhere.
            effects = (by_token.T @ gained.T).T - np.outer(gained[:, seen > 0].sum(1), mean)  # [R, targets]
            for i in np.flatnonzero(edges[:, 0] == a):
                of_edge = effects[:, column[i]]
                effect[i], error[i] = of_edge.mean(), of_edge.std(ddof=1) / np.sqrt(len(of_edge))
                carried = gained.mean(0) * (by_token[:, column[i]].toarray().ravel() - mean[column[i]]) * (seen > 0)
                carriers[i] = most(carried)
    return effect, error, carriers


def most(values: Array) -> list[int]:
    """The places of the largest of some values, of at most `CARRIERS` that come near the first."""
    top = np.argsort(-values, kind="stable")[:CARRIERS]
    return [int(i) for i in top if values[i] > 0.1 * values[top[0]] > 0]


def _sample(column: csr_matrix, draw: np.random.Generator) -> tuple[Array, Array]:
    """Some tokens on which a feature [N, 1] fires, and its values there."""
    chosen = draw.choice(len(column.indices), min(len(column.indices), CONTEXTS), replace=False)
    return column.indices[chosen], column.data[chosen]


@torch.no_grad()
def _gained(model: LanguageModel, site: Site, removed: Tensor, reading: Reading, tokens: Array) -> Array:
    """Δp [R, V] of what comes after R contexts, which end at `tokens` [R], where `removed` [R, d] is taken away."""
    contexts = [reading.texts[reading.text[n]][: int(reading.position[n]) + 1].tolist() for n in tokens.tolist()]
    order = sorted(range(len(contexts)), key=lambda i: -len(contexts[i]))
    gained = np.zeros((len(contexts), model.vocab_size))
    parents = set(model.parents(site, model.sites).values())
    while order:
        length = len(contexts[order[0]])
        most = max(1, min(BATCH_TOKENS // length, LOGIT_BYTES // (8 * model.vocab_size)))
        same = [i for i in order[:most] if len(contexts[i]) == length or not model.padding_shows]
        order = order[len(same) :]
        batch = Tokens.from_rows([contexts[i] for i in same]).to(model.device)

        def without(x: Tensor, part: Tensor = removed[same, None]) -> Tensor:
            return torch.cat([x[:, :-1], x[:, -1:] - part.to(x)], dim=1)

        base = model.run(batch, capture={site, *parents}, last_only=True)
        skip = model.resume_from(site, {parent: base.activations[parent] for parent in parents})
        edited = model.run(batch, edits={site: without}, skip=skip, last_only=True)
        p, p_without = (run.logits[:, -1].cpu().double().softmax(-1) for run in (base, edited))
        gained[same] = (p - p_without).numpy()
    return gained
