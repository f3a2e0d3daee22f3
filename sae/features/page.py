"""The page of a feature, as records."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

from sae._frames import Result
from sae.features.contexts import Context, FeatureSummary

if TYPE_CHECKING:
    import pandas as pd

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class AblatedContext(Context):
    """A context with what ablating the feature does to each of its tokens."""

    change: list[float | None]
    """Change of each token's log-probability, in nats; None where nothing predicts it."""


@dataclass(frozen=True)
class IntervalSample:
    """Contexts drawn at random from those in which the feature's activation is in an interval."""

    low: float
    """Its lower end, inclusive; 0 stands for the smallest activation above zero."""
    high: float
    """Its upper end, exclusive; of the last interval the largest activation, inclusive."""
    share: float
    """Share of all tokens on which the activation is in it."""
    contexts: list[AblatedContext]
    """Each has the drawn token at its peak."""


@dataclass(frozen=True)
class FeaturePage(FeatureSummary):
    """The data of a feature's page."""

    n_tokens: int
    """Tokens of the text that count."""
    quantiles: list[tuple[float, float]]
    """Shares, and the activation that such a share of those above zero is below."""
    histogram: dict[str, list[float]]
    """Activations above zero: `edges` of equal bins from 0 on, and `counts` of tokens in each."""
    logit_histogram: dict[str, list[float]]
    """The direct effect of one unit on the logits of all tokens: `edges` and `counts`."""
    samples: list[IntervalSample]
    """Random contexts by interval of activation, strongest interval first."""
    random: list[AblatedContext]
    """Contexts of tokens drawn at random from all of the text."""
    similar: dict[str, list[tuple[str, float]]]
    """Features that are alike: by `decoder`, the cosine of what they write, and by `activation`, the correlation over
    tokens; (name, value), most alike first.
    """

    @property
    def name(self) -> str:
        """`resid_3/120`."""
        return f"{self.site}/{self.index}"

    def _repr_html_(self) -> str:
        """Its numbers and contexts, for notebooks: shade for activation, underline for the change of log p."""
        contexts: list[Context] = [*self.contexts, *(context for sample in self.samples for context in sample.contexts)]
        strongest = max((max(context.activations) for context in contexts), default=0.0) or 1.0
        largest = max((abs(c or 0.0) for context in contexts for c in _changes(context)), default=0.0) or 1.0
        facts = f"on at {self.density:.2%} of {self.n_tokens:,} tokens, largest activation {self.max_activation:.3g}"
        raises, lowers = (_words([t for t, _ in tokens]) for tokens in (self.top_logits, self.bottom_logits))
        rows = [
            f"<b>{self.name}</b> {escape(_words(self.top_tokens))}",
            facts,
            f"raises {escape(raises)}; lowers {escape(lowers)}",
        ]
        rows += [_context_html(context, strongest, largest) for context in self.contexts]
        for sample in self.samples:
            rows.append(f"<i>{sample.low:.3g} to {sample.high:.3g}, {sample.share:.2%} of tokens</i>")
            rows += [_context_html(context, strongest, largest) for context in sample.contexts]
        return "".join(f'<div dir="auto">{row}</div>' for row in rows)


def _changes(context: Context) -> list[float | None]:
    return context.change if isinstance(context, AblatedContext) else [None] * len(context.tokens)


def _context_html(context: Context, strongest: float, largest: float) -> str:
    """A line of text; strongest, largest: the activation and change that shade and underline a token fully."""
    spans = []
    for token, activation, change in zip(context.tokens, context.activations, _changes(context), strict=True):
        shade = f"background:rgb(214 140 20/{max(0.0, min(1.0, 0.6 * activation / strongest)):.2f})"
        share = min(1.0, abs(change or 0.0) / largest)
        line = f";border-bottom:2px solid rgb({'192 92 8' if (change or 0) < 0 else '36 104 176'}/{share:.2f})"
        spans.append(f'<span style="{shade}{line if share > 0.02 else ""}">{escape(token)}</span>')
    return "".join(spans)


class FeaturePages(dict[str, FeaturePage], Result):
    """Pages by the feature's name, `resid_3/120`."""

    def to_frame(self) -> pd.DataFrame:
        """A row a feature: how often and how strongly it is on, and what for."""
        import pandas as pd

        columns = ("density", "max_activation", "mean_activation")
        rows = [
            {
                "feature": name,
                **{column: getattr(page, column) for column in columns},
                "top tokens": _words(page.top_tokens),
                "raises": _words([token for token, _ in page.top_logits]),
                "strongest context": page.contexts[0].text() if page.contexts else "",
            }
            for name, page in self.items()
        ]
        return pd.DataFrame(rows).set_index("feature") if rows else pd.DataFrame()

    def to_dict(self) -> dict[str, Any]:
        """All pages as JSON-ready values."""
        return {"schema_version": SCHEMA_VERSION, "features": [page.to_dict() for page in self.values()]}


def _words(tokens: Sequence[str]) -> str:
    return " ".join(token.strip() for token in tokens[:4])
