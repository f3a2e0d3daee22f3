"""The words and colours that every drawing of a circuit shares.

Colour: one diverging scale, orange to blue, safe for the common forms of colour blindness (after ColorBrewer's PuOr and
RdBu). By class it shows for which of two classes of prompts a feature is on (`graphs.classes`), by effect whether it
lowers or raises the metric. Effects are placed at sign · sqrt(|value| / largest), since they are heavy-tailed and a
linear scale would leave all but three nodes white.
"""

from __future__ import annotations

import bisect
import math
import unicodedata
from collections.abc import Iterable

from graphs.feature_graph import OTHERS, FeatureGraph, Node

DIVERGING = ("#a84d04", "#e08a2e", "#fbd9ae", "#f7f7f5", "#cfe0ef", "#6aa5d2", "#1c5fa8")
"""From the most negative to the most positive value."""
NEGATIVE_EDGE, POSITIVE_EDGE = "#c05c08", "#2468b0"
PLAIN_EDGE = "#4a5566"
"""Where colours stand for classes; edges below zero are dashed."""
INK, PALE_INK, RULE = "#1d2430", "#69727f", "#d5dae1"

_VISIBLE = {"\n": "⏎", "\r": "␍", "\t": "⇥", "\u00a0": "⍽"}


def diverging_colour(value: float, largest: float) -> str:
    """`#rrggbb` for a value in [−largest, largest]."""
    return scale_colour(signed_root(value, largest))


def scale_colour(share: float) -> str:
    """`#rrggbb` for a share of the scale, from −1 to 1."""
    step = (min(max(share, -1.0), 1.0) + 1) / 2 * (len(DIVERGING) - 1)
    low = min(int(step), len(DIVERGING) - 2)
    return mixed(DIVERGING[low], DIVERGING[low + 1], step - low)


def mixed(start: str, end: str, share: float) -> str:
    """The colour between two, `share` of the way from `start` to `end`."""
    channels = (round(a + (b - a) * share) for a, b in zip(_rgb(start), _rgb(end), strict=True))
    return "#{:02x}{:02x}{:02x}".format(*channels)


def signed_root(value: float, largest: float) -> float:
    """sign(value) · sqrt(|value| / largest), clipped to [−1, 1]; 0 when `largest` is 0."""
    if largest <= 0:
        return 0.0
    return math.copysign(math.sqrt(min(abs(value) / largest, 1.0)), value)


def ink_on(background: str) -> str:
    """Dark or white text, whichever contrasts more with the background (relative luminance of WCAG 2)."""
    linear = [c / 255 / 12.92 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in _rgb(background)]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return INK if luminance > 0.22 else "#ffffff"


def largest_effect(graph: FeatureGraph) -> float:
    """The largest |effect| of a feature or error."""
    return max((abs(node.effect) for node in graph.nodes() if node.kind != "metric"), default=0.0)


def largest_weight(graph: FeatureGraph) -> float:
    """The largest |weight| of an edge."""
    return max((abs(edge.weight) for edge in graph.edges()), default=0.0)


def number(value: float) -> str:
    """A signed number to two or three figures: `+1.23`, `−0.041`, `+3e−05`."""
    if value == 0:
        return "0"
    size = abs(value)
    if size >= 100:
        text = f"{value:+.0f}"
    elif size >= 0.095:
        text = f"{value:+.2f}"
    elif size >= 0.00095:
        text = f"{value:+.2g}"
    else:
        text = f"{value:+.0e}"
    return text.replace("-", "−")


def visible(token: str) -> str:
    """A token as a person can see it: line breaks and tabs as signs, characters without a form as `�`."""
    shown = token
    if not (token.isascii() and token.isprintable()):  # most are
        shown = "".join(
            _VISIBLE.get(c, "�" if unicodedata.category(c) in ("Cc", "Cs") or c in "\ufffe\uffff" else c) for c in token
        )
    return shown if shown.strip() else shown.replace(" ", "␣")


def describe(graph: FeatureGraph, node: Node) -> str:
    """Describe a feature in one line: a person's label, failing that an automatic one, failing that the tokens it is
    strongest on and, in the last third of the sites, after an arrow the tokens it promotes (`She · He → is · has`),
    failing that nothing.
    """
    if node.label or node.attributes.get("automatic_label"):
        return visible(node.label or str(node.attributes["automatic_label"]))
    if node.kind in OTHERS:
        return "SAE error" if node.kind == "error" else "skip connection"
    if node.kind == "metric":
        return "metric"
    tokens, promoted = (_first_words(node.attributes.get(key)) for key in ("top_tokens", "top_logits"))
    if not is_late(graph, node) or not promoted:
        return " · ".join(tokens)
    return f"{' · '.join(tokens[:2])} → {' · '.join(promoted[:2])}"


def is_late(graph: FeatureGraph, node: Node) -> bool:
    """Whether a node's site is in the last third, where what its direction adds to the logits means something."""
    return node.kind == "feature" and 3 * graph.rank(node.id) >= 2 * len(graph.sites)


def _first_words(items: Iterable[str | tuple[str, float]] | None) -> list[str]:
    """The first three tokens of a list, each alone or with a number, readable; without those that differ in case."""
    words: dict[str, str] = {}
    for item in items or ():
        word = visible(str(item[0] if isinstance(item, list | tuple) else item)).strip()
        words.setdefault(word.lower(), word)
    return list(words.values())[:3]


def position_name(graph: FeatureGraph, position: int | str | None) -> str:
    """The header of a position's column: its token when `metadata["tokens"]` gives one, else the position itself."""
    tokens = graph.metadata.get("tokens", ())
    if isinstance(position, int) and 0 <= position < len(tokens):
        return visible(str(tokens[position])).strip()
    return "all positions" if position is None else visible(str(position))


def span_words(graph: FeatureGraph, position: int | str | None) -> str:
    """Some words of a named span, `kings, king, clerks …`, as `metadata["span_words"]` gives them, and whether it is
    where all prompts end; else nothing.
    """
    words = graph.metadata.get("span_words", {}).get(position, ())
    shown = ", ".join(visible(str(word)) for word in words) + (" …" if words else "")
    is_last = position not in (None, "last") and graph.metadata.get("last_span") == position
    return " · ".join(part for part in (shown, "last token" if is_last else "") if part)


def tooltip(graph: FeatureGraph, node: Node) -> str:
    """Everything known about a node, a line each."""
    lines = [node.id, *([describe(graph, node)] if describe(graph, node) and node.kind != "metric" else [])]
    if node.position is not None:
        lines.append(f"at “{position_name(graph, node.position)}” (position {node.position})")
    lines += effect_words(graph, node)
    for key in ("exact_effect", "activation", "density"):
        value = node.attributes.get(key)
        if isinstance(value, int | float):
            lines.append(f"{key.replace('_', ' ')} {number(value) if key == 'exact_effect' else f'{value:.3g}'}")
    lines += evidence(node)
    lines += _token_lines(node, ("top_tokens", "top_logits", "bottom_logits"))
    return "\n".join(map(visible, lines))


def effect_words(graph: FeatureGraph, node: Node) -> list[str]:
    """`effect +0.12`, `total effect +3.4`; nothing for the metric of prompts without a patch side."""
    if node.kind == "metric" and graph.metadata.get("total_effect", node.effect) is None:
        return []
    return [f"{'total effect' if node.kind == 'metric' else 'effect'} {number(node.effect)}"]


def effect_number(node: Node) -> str:
    """The effect, and with a mark what patching the node alone does where that was measured: `+2.67 ✓+0.25`."""
    exact = node.attributes.get("exact_effect")
    return f"{number(node.effect)} ✓{number(exact)}" if isinstance(exact, int | float) else number(node.effect)


def evidence(node: Node) -> list[str]:
    """A line on how far the effect can be trusted: its interval, and how it differs from exact patching."""
    lines = []
    if "interval" in node.attributes:
        low, high = node.attributes["interval"]
        lines.append(f"interval {number(low)} to {number(high)}")
    if "disagrees" in node.attributes:
        lines.append(f"estimate differs from exact patching in {node.attributes['disagrees']}")
    return lines


def _token_lines(node: Node, keys: Iterable[str]) -> list[str]:
    lines = []
    for key in keys:
        items = [item[0] if isinstance(item, list | tuple) else item for item in node.attributes.get(key, ())]
        if items:
            lines.append(f"{key.replace('_', ' ')}: {' '.join(visible(str(item)).strip() for item in items[:8])}")
    return lines


# Widths of DejaVu Sans in thousandths of the font size, by class of character; capitals and unknown ones count as 690.
_NARROW, _MIDDLE, _WIDE = "iIlj.,:;'|!", "ftr()[]-/ “”·", "mwMW%@—"


def text_width(text: str, size: float, *, bold: bool = False) -> float:
    """Approximate width of the text in points, never much below the true one."""
    total = 0.0
    for c in text:
        if unicodedata.east_asian_width(c) in "WF":
            total += 1000
        elif c in _NARROW:
            total += 320
        elif c in _MIDDLE:
            total += 400
        elif c in _WIDE:
            total += 950
        else:
            total += 615 if c.islower() or c.isdigit() else 690
    return total / 1000 * size * (1.13 if bold else 1.0)


def fit(text: str, size: float, width: float, *, bold: bool = False) -> str:
    """The text, cut with an ellipsis where it would be wider than `width` points."""
    if text_width(text, size, bold=bold) <= width:
        return text
    most = bisect.bisect_right(range(len(text)), width, key=lambda n: text_width(text[:n] + "…", size, bold=bold)) - 1
    return text[: max(most, 0)].rstrip() + "…"


def wrap(text: str, size: float, width: float, *, lines: int, bold: bool = False) -> list[str]:
    """The text on at most `lines` lines no wider than `width` points, broken at spaces, the last cut if need be."""
    wrapped: list[str] = []
    words = text.split()
    while words and len(wrapped) < lines - 1:
        line = words.pop(0)
        while words and text_width(f"{line} {words[0]}", size, bold=bold) <= width:
            line += " " + words.pop(0)
        wrapped.append(fit(line, size, width, bold=bold))
    return [*wrapped, fit(" ".join(words), size, width, bold=bold)] if words else wrapped


def count(n: int, noun: str) -> str:
    """`1 feature`, `2 features`."""
    return f"{n} {noun}" + ("" if n == 1 else "s")


def _rgb(colour: str) -> tuple[int, int, int]:
    return int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16)
