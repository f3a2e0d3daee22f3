"""Why attention looks there: which heads carry the strongest edges, and which features make them look where they do.

1. Head loadings of the strongest edges into and out of attention sites (`circuits.discovery.attention.head_loadings`).
2. An edge into an attention site goes from one token to another, where the circuit keeps them apart: the heads, queries
   and keys that carry most, by the sum of |loading|, have their scores split over pairs of features
   (`circuits.discovery.attention.qk`), where the circuit has an autoencoder of what the layer reads. Or the head, the
   query and the key that the caller asks for.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from circuits.discovery.attention.head_loadings import head_loadings
from circuits.discovery.attention.qk import heads_looking, qk_attribution, read_site
from circuits.discovery.attention.results import AttentionReport, HeadLoadings
from circuits.metrics.metrics import Metric
from circuits.options import AttentionOptions
from circuits.prompts.dataset import PromptSet
from sae.errors import UserError
from sae.model.sites import Site

if TYPE_CHECKING:
    from circuits.circuit import Circuit


def explain_attention(
    circuit: Circuit,
    prompts: PromptSet | None = None,
    options: AttentionOptions | None = None,
    *,
    metric: str | Metric | None = None,
    progress: bool = True,
) -> AttentionReport:
    """Split the circuit's edges through attention over heads, and the scores of the heads that carry most over pairs of
    features; or the score of one head for one query and key.

    Args:
        circuit: The circuit, whose model, SAEs and metric are used.
        prompts: The prompts to measure on; those the circuit was found on by default.
        options: Which head, query and key; how many edges and scores where none is given.
        metric: The circuit's own, given again where it is Python code and the circuit is from a file.
        progress: Whether to show progress bars.

    Returns:
        The edges by head, the scores by pairs of features, and with a query and a key how much every head looks there.

    Raises:
        UserError: A query without a key, a head without a layer, or what `head_loadings` and `qk_attribution` refuse.
    """
    options = options or AttentionOptions()
    if options.query is None or options.key is None:
        loadings = head_loadings(circuit, prompts, edges=options.edges, metric=metric, progress=progress)
        scores = [
            qk_attribution(circuit, prompts, layer=layer, head=head, query=query, key=key, progress=progress)
            for layer, head, query, key in _busiest(loadings, options.scores, _readable(circuit))
        ]
        return AttentionReport(loadings, scores, [])
    query, key, than = options.query, options.key, options.than
    looking = heads_looking(circuit, prompts, query=query, key=key, than=than)
    layers = [row for row in looking if options.layer in (None, row.layer)]
    heads = [row for row in layers if options.head in (None, row.head)]
    if not heads:
        n_heads = 1 + max(row.head for row in looking)
        raise UserError(
            f"layer is {options.layer}, head {options.head}: this model has layers "
            f"{', '.join(map(str, sorted({row.layer for row in looking})))} with heads 0 to {n_heads - 1}"
        )
    score = qk_attribution(
        circuit, prompts, layer=heads[0].layer, head=heads[0].head, query=query, key=key, than=than, progress=progress
    )
    return AttentionReport(None, [score], looking)


def _readable(circuit: Circuit) -> set[int]:
    """The layers whose attention reads a site that the circuit has an autoencoder of: no other scores can be split."""
    layers = [site.layer or 0 for site in circuit.model.sites if site.kind == "attn"]
    return {layer for layer in layers if read_site(circuit.model, layer) in circuit.saes}


def _busiest(loadings: HeadLoadings, n: int, layers: set[int]) -> list[tuple[int, int, str, str]]:
    """Layer, head, query and key of the n that carry most from one token to another, of these layers."""
    carried: Counter[tuple[int, int, str, str]] = Counter()
    for edge in loadings.edges:
        (_, _, key), (_, _, query) = edge.source.partition("@"), edge.target.partition("@")
        if edge.is_into and key and query:
            layer = Site.parse(edge.site).layer or 0
            for head, value in enumerate(edge.heads if layer in layers else ()):
                carried[layer, head, query, key] += abs(value)  # type: ignore[assignment]
    return [one for one, value in carried.most_common(n) if value]
