"""How feature pages are made: the same options in Python and on the command line."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from sae._options import Count, Positive, Range, Seed, TokenCount


@dataclass(frozen=True, kw_only=True)
class FeaturePageOptions:
    """Options of feature pages: the text that is read, and how much of it a page shows."""

    tokens: TokenCount = 1_000_000
    """Tokens of the text that are read."""
    contexts: Positive = 10
    """Strongest contexts of a feature, each with another token at its peak as far as there are such."""
    intervals: Annotated[int, Range(1, 16)] = 5
    """Intervals of activation, of about equal width, that contexts are drawn from at random."""
    samples: Count = 4
    """Contexts drawn from each interval, and as many from all of the text."""
    before: Count = 14
    """Tokens shown before the one that a context is about."""
    after: Count = 5
    """Tokens shown after it."""
    listed: Positive = 10
    """Tokens raised and lowered most, and similar features, that are listed."""
    correlation_tokens: Count = 100_000
    """Tokens over which activations are correlated with those of other features; 0 leaves it out."""
    seed: Seed = 0
    """Seed of the random draws."""
