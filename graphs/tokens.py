"""Tokens shaded by how strongly a feature is active on them, as HTML for a page or a report."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from graphs.errors import GraphError
from graphs.style import visible


def highlight_tokens(tokens: Sequence[str], activations: Sequence[float], *, largest: float | None = None) -> str:
    """A run of `<span>`s, active tokens as `<mark>` with a background as strong as their activation.

    `largest` is the activation of full strength (default: the largest of these), to be given when several contexts are
    to be compared. Colours are inline, so the text looks the same in any page, light or dark; the activation is in the
    tooltip.
    """
    if len(tokens) != len(activations):
        raise GraphError(f"{len(tokens)} tokens cannot be shaded by {len(activations)} activations")
    top = max((a for a in activations), default=0.0) if largest is None else largest
    return "".join(_token(token, activation, top) for token, activation in zip(tokens, activations, strict=True))


def _token(token: str, activation: float, largest: float) -> str:
    text = escape(visible(token) if token.strip() else token.replace("\n", "⏎"))
    strength = min(max(activation / largest, 0.0), 1.0) if largest > 0 else 0.0
    if strength < 0.005:
        return f"<span>{text}</span>"
    style = f"background:rgb(214 140 20 / {0.08 + 0.62 * strength:.2f});color:inherit;border-radius:3px"
    return f'<mark style="{style}" title="{activation:.3g}">{text}</mark>'
