"""Which feature of one circuit is which of another, where their autoencoders differ.

At every site, among the features that have an effect in either circuit,

    similarity(i, j) = (cos(W_dec_a[i], W_dec_b[j]) + corr(f_i, g_j)) / 2,

the cosine of what they write and the Pearson correlation of when they are on, over all tokens but special ones of the
prompts of both circuits (`sae.features.matching`). Features are paired one to one so that the sum of similarities is
largest (Hungarian algorithm); a pair less similar than `LEAST` is none. Where the autoencoders are the same, every
feature is its own partner.

Legend: n_a, n_b features in play at a site.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn.functional import normalize

from circuits.attribution.nodes import SiteNodes
from circuits.circuit import Circuit
from sae.autoencoder import SparseFeatures
from sae.data.batches import counted_tokens
from sae.errors import UserError
from sae.features.matching import ActivationCorrelation
from sae.model.language_model import LanguageModel, Tokens
from sae.model.sites import Site
from sae.saes import saes_fingerprint

LEAST = 0.3
"""Similarity from which on two features may be partners."""
MOST = 4096
"""Features of a site in play at most: those of the largest |effect|."""
BATCH = 32
"""Prompts of one forward pass."""

Partners = dict[Site, dict[int, int]]
"""site -> feature of the second circuit -> its partner in the first; those without one are left out."""


def same_dictionaries(a: Circuit, b: Circuit) -> bool:
    """Whether the circuits' features have the same numbers: at the sites of both they were found with the same
    autoencoders.
    """
    if a.metadata.get("saes_fingerprint") == b.metadata.get("saes_fingerprint") is not None:
        return True
    shared = [site for site in a.nodes if site in b.nodes]
    if len(shared) == len(a.nodes) == len(b.nodes):  # the fingerprints are of the same sites
        return False
    return saes_fingerprint(a.saes.subset(shared)) == saes_fingerprint(b.saes.subset(shared))


def find_partners(a: Circuit, b: Circuit, *, prompts: int) -> tuple[Partners, float | None]:
    """The partner in a of every feature of b that has one, at the sites of both.

    Args:
        a, b: two circuits of one model, or of models that read the same tokens.
        prompts: prompts of each circuit over which activations are correlated, at most.

    Returns:
        The partners, and the mean similarity of the pairs that were tried, those less similar than `LEAST` among them,
        weighted by |effect| in b; None for the same autoencoders.

    Raises:
        UserError: the models have different vocabularies.
    """
    sites = [site for site in a.nodes if site in b.nodes]
    if same_dictionaries(a, b):
        both = {site: {*_features(a.nodes[site]).tolist(), *_features(b.nodes[site]).tolist()} for site in sites}
        return {site: {feature: feature for feature in sorted(features)} for site, features in both.items()}, None
    if a.model.vocab_size != b.model.vocab_size:
        raise UserError(
            f"the circuits are of models with {a.model.vocab_size} and {b.model.vocab_size} tokens: their features "
            "cannot be compared on the same prompts"
        )
    in_play = {site: (_features(a.nodes[site]), _features(b.nodes[site])) for site in sites}
    correlations = _correlations(a, b, in_play, prompts)
    partners: Partners = {}
    similarity, weight = 0.0, 0.0
    for site, (of_a, of_b) in in_play.items():
        rows = normalize(a.saes[site].W_dec[of_a.to(a.saes.device)].float().cpu(), dim=-1)
        columns = normalize(b.saes[site].W_dec[of_b.to(b.saes.device)].float().cpu(), dim=-1)
        cosine = rows @ columns.T if rows.shape[1] == columns.shape[1] else None
        alike = correlations[site] if cosine is None else (cosine + correlations[site]) / 2  # [n_a, n_b]
        chosen_a, chosen_b = linear_sum_assignment(alike.numpy(), maximize=True)
        values = alike.numpy()[chosen_a, chosen_b]
        close = values >= LEAST
        numbers = of_b[chosen_b[close]].tolist(), of_a[chosen_a[close]].tolist()
        partners[site] = dict(zip(*numbers, strict=True))
        nodes = b.nodes[site]
        effects = np.bincount(nodes.feature.numpy(), nodes.effect.abs().numpy(), nodes.n_features)  # over its spans
        weights = effects[of_b.numpy()[chosen_b]]
        similarity, weight = similarity + float(weights @ values), weight + float(weights.sum())
    return partners, similarity / weight if weight else 0.0


def _features(nodes: SiteNodes) -> Tensor:
    """The numbers of at most `MOST` features of a site, those of the largest |effect|, rising."""
    features = nodes.feature[nodes.is_feature]  # strongest first
    first = dict.fromkeys(features.tolist())
    return torch.tensor(sorted(list(first)[:MOST]), dtype=torch.long)


def _correlations(
    a: Circuit, b: Circuit, in_play: Mapping[Site, tuple[Tensor, Tensor]], prompts: int
) -> dict[Site, Tensor]:
    """Correlation of the features in play over the prompts of both circuits, [n_a, n_b] per site."""
    sums = {site: ActivationCorrelation(len(of_a), len(of_b)) for site, (of_a, of_b) in in_play.items()}
    batches = [batch for circuit in (a, b) for batch in circuit.prompts[:prompts].batches(BATCH)]
    for tokens in [side for batch in batches for side in (batch.clean, batch.patch) if side is not None]:
        runs = [_inputs(one.model, tokens, one.saes.read_sites(in_play)) for one in (a, b)]
        for site, (of_a, of_b) in in_play.items():
            f, g = (
                _sparse(one.saes[site].encode_some(x[site], features.to(x[site].device)))
                for one, x, features in zip((a, b), runs, (of_a, of_b), strict=True)
            )
            sums[site].update(f, g, len(runs[0][site]))
    return {site: correlation.rows(slice(None)) for site, correlation in sums.items()}


@torch.no_grad()
def _inputs(model: LanguageModel, tokens: Tokens, reads: Mapping[Site, Site]) -> dict[Site, Tensor]:
    """The input of the dictionary of each site, [N, r] of the tokens of a batch that are no padding nor special."""
    tokens = tokens.to(model.device)
    run = model.run(tokens, capture=reads.values(), need_logits=False)
    counted = counted_tokens(model, tokens)
    return {site: run.activations[read][counted] for site, read in reads.items()}


def _sparse(f: Tensor) -> SparseFeatures:
    """The nonzero activations among f [N, n]."""
    token, feature = f.nonzero(as_tuple=True)
    return SparseFeatures(token.cpu(), feature.cpu(), f[token, feature].cpu())
