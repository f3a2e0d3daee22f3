"""The strongest nodes of a circuit: effect, meaning, and the text they fire on."""

from __future__ import annotations

from typing import Any

from circuits.report.markup import Html, missing, section, signed, text
from graphs.drawing.style import describe, position_name, visible
from graphs.feature_graph import FeatureGraph, Node

CONTEXTS_SHOWN = 3
"""Contexts that stand open; the others unfold."""


def features_section(graph: FeatureGraph | None, *, limit: int) -> Html:
    """A card for each of the `limit` strongest nodes, strongest first."""
    title = "The features"
    if graph is None:
        return section("features", title, missing("No circuit yet.", "sfc discover --out RUN"))
    nodes = sorted((node for node in graph.nodes() if node.kind != "metric"), key=lambda node: -abs(node.effect))
    shown = nodes[:limit]
    largest = abs(shown[0].effect) if shown else 1.0
    lead = (
        f"The {len(shown)} strongest of {len(nodes)} nodes. The bar is the effect on the metric when the node goes "
        "from its clean to its patch value: to the right it raises the metric, to the left it lowers it. Lines of text "
        "are where the feature fires most, aligned at its peak; the stronger the tint, the higher the activation."
    )
    hint = ""
    if not any(node.attributes.get("contexts") for node in shown):
        hint = missing("The features are not described yet.", "sfc discover --text T --out RUN")
    cards = "".join(_card(graph, node, largest, rank) for rank, node in enumerate(shown, start=1))
    return section("features", title, f'<p class="lead">{lead}</p>{hint}{cards}{_rest(nodes[limit:])}')


def _card(graph: FeatureGraph, node: Node, largest: float, rank: int) -> str:
    place = "" if node.position is None else f'<span class="at">at “{text(position_name(graph, node.position))}”</span>'
    if node.kind == "error":
        body = f'<p class="pale">What the autoencoder at {text(node.site)} misses.</p>'
    else:
        body = _meaning(node.attributes) + _contexts(node.attributes.get("contexts") or [])
    label = f'<p class="label">{text(visible(node.label))}</p>' if node.label else ""
    return (
        f'<article class="card {node.kind}" id="node-{text(node.id)}"><header><span class="rank">{rank}</span>'
        f"<h3>{text(node.name)}</h3>{place}{_bar(node.effect, largest)}{_numbers(node.attributes)}</header>"
        f"<div>{label}{body}</div></article>"
    )


def _rest(nodes: list[Node]) -> str:
    """The weaker nodes in one line each, so that every node of the drawing can be looked up."""
    if not nodes:
        return ""
    lines = [
        f'<li id="node-{text(node.id)}"><code>{text(node.id)}</code> '
        f'<b class="{"pos" if node.effect >= 0 else "neg"}">{signed(node.effect, 3)}</b> {text(describe(node))}</li>'
        for node in nodes
    ]
    return f'<h3 class="rest">The other {len(nodes)}</h3><ul class="rest">{"".join(lines)}</ul>'


def _bar(effect: float, largest: float) -> str:
    width = 50 * min(abs(effect) / largest, 1.0) if largest else 0.0
    side, left = ("pos", 50.0) if effect >= 0 else ("neg", 50.0 - width)
    bar = f'<i class="{side}" style="left:{left:.1f}%;width:{width:.1f}%"></i>'
    number = f'<b class="{side}">{signed(effect, 3)}</b>'
    return f'<div class="bar" role="img" aria-label="effect {effect:+.3f}">{bar}</div>{number}'


def _numbers(attributes: dict[str, Any]) -> str:
    facts = []
    if isinstance(attributes.get("density"), int | float):
        facts.append(f"active on {100 * attributes['density']:.2g} % of tokens")
    if isinstance(attributes.get("max_activation"), int | float):
        facts.append(f"peak {attributes['max_activation']:.3g}")
    if isinstance(attributes.get("exact_effect"), int | float):
        facts.append(f"exact effect {signed(attributes['exact_effect'], 3)}")
    if "disagrees" in attributes:
        facts.append(f"the estimate differs in {text(attributes['disagrees'])}")
    if "interval" in attributes:
        low, high = attributes["interval"]
        facts.append(f"interval {signed(low, 3)} to {signed(high, 3)}")
    return f"<small>{' · '.join(facts)}</small>" if facts else ""


def _meaning(attributes: dict[str, Any]) -> str:
    """Tokens it fires on, tokens it makes likelier and unlikelier."""
    rows = []
    for key, words in (("top_tokens", "fires on"), ("top_logits", "raises"), ("bottom_logits", "lowers")):
        tokens = [item[0] if isinstance(item, list | tuple) else item for item in attributes.get(key) or []][:8]
        if tokens:
            chips = "".join(f"<span>{text(visible(str(token)))}</span>" for token in tokens)
            rows.append(f"<div><dt>{words}</dt><dd>{chips}</dd></div>")
    return f'<dl class="tokens">{"".join(rows)}</dl>' if rows else ""


def _contexts(contexts: list[dict[str, Any]]) -> str:
    if not contexts:
        return ""
    largest = max((max(context["activations"], default=0.0) for context in contexts), default=0.0) or 1.0
    lines = [_context(context, largest) for context in contexts]
    more = lines[CONTEXTS_SHOWN:]
    folded = f"<details><summary>{len(more)} more</summary>{''.join(more)}</details>" if more else ""
    return f'<div class="contexts">{"".join(lines[:CONTEXTS_SHOWN])}{folded}</div>'


def _context(context: dict[str, Any], largest: float) -> str:
    """One line, split at the peak: what comes before is flush right, the peak and what follows flush left."""
    activations, peak = context["activations"], context.get("peak")
    if peak is None:
        peak = max(range(len(activations)), key=activations.__getitem__)
    spans = [_token(token, value, largest) for token, value in zip(context["tokens"], activations, strict=True)]
    return f'<div class="kwic"><span>{"".join(spans[:peak])}</span><span>{"".join(spans[peak:])}</span></div>'


def _token(token: str, value: float, largest: float) -> str:
    shown = text("".join(visible(c) if c in "\n\r\t" else c for c in token))
    if value <= 0:
        return shown
    return f'<mark style="--a:{min(value / largest, 1.0):.2f}" title="{value:.3g}">{shown}</mark>'
