"""Results of an evaluation (`sae.evaluation.evaluate`): numbers by site, as JSON and as tables."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from sae._files import without_nan
from sae._frames import Result, frame_text
from sae.evaluation.metrics import DensityHistogram

if TYPE_CHECKING:
    import pandas as pd

SCHEMA_VERSION = 1
EVALUATION_FILE = "evaluation.json"
REBUILT = {
    "l0": "L0", "explained_variance": "EV", "cosine": "cosine", "l2_ratio": "L2 ratio", "relative_bias": "bias",
    "shrinkage": "shrinkage", "dead_fraction": "dead", "dense_fraction": "dense",
}  # fmt: skip
"""Columns of the first table, by the metrics they show."""
PREDICTED = {
    "ce_added": "CE +", "ce_recovered": "CE recovered", "kl": "KL", "kl_recovered": "KL recovered",
    "top1_consistency": "top-1", "error_matters": "error matters",
}  # fmt: skip
"""Columns of the second."""


@dataclass(frozen=True)
class Predictions:
    """Next-token predictions with x̂ in place of x, at one site or at several."""

    ce: float
    """Cross-entropy in nats with the errors dropped."""
    ce_zero: float
    """Cross-entropy with 0 in place of x at the same sites."""
    ce_recovered: float
    """(CE_zero − CE) / (CE_zero − CE_model); nan where zeros cost nothing."""
    kl: float
    """Mean KL divergence from the untouched model's distribution, in nats."""
    kl_recovered: float
    """(KL_zero − KL) / KL_zero."""
    top1_consistency: float
    """Share of the predictions whose most probable token is the untouched model's."""


@dataclass(frozen=True)
class SiteMetrics:
    """One autoencoder, alone in the model."""

    architecture: str
    """Its architecture."""
    n_features: int
    """Its number of features F."""
    l0: float
    """Mean number of active features per token."""
    explained_variance: float
    """1 − Σ‖x − x̂‖² / Σ‖x − x̄‖²."""
    mse: float
    """Squared error, mean over tokens and dimensions."""
    cosine: float
    """Mean cosine of x and x̂."""
    l2_ratio: float
    """Mean of ‖x̂‖ / ‖x‖."""
    relative_bias: float
    """Σ‖x̂‖² / Σ⟨x, x̂⟩; 1 is unbiased."""
    shrinkage: float
    """How much stronger the features should be for the least error, as a fraction; 0 is best."""
    dead_fraction: float
    """Share of the features that never fired on the text."""
    dense_fraction: float
    """Share of the features that fired on more than a tenth of the tokens."""
    density_histogram: DensityHistogram
    """Number of features by log10 of the share of tokens they fire on."""
    predictions: Predictions
    """The model with this site's x̂ in place of x."""
    ce_error_kept: float | None
    """Cross-entropy with all sites spliced and only this site's error kept; None unless asked for. Its distance to the
    cross-entropy of all sites spliced is what this site's error matters downstream."""


@dataclass(frozen=True)
class Evaluation(Result):
    """Metrics of each autoencoder and of all together, as `evaluate_saes` returns them."""

    n_tokens: int
    """Tokens the reconstruction metrics are pooled over."""
    n_predictions: int
    """Next-token predictions the cross-entropies are pooled over."""
    ce_model: float
    """Cross-entropy of the untouched model."""
    ce_errors_kept: float
    """Cross-entropy with x̂ + e at all sites: equal to `ce_model` up to rounding, or a site is wired wrongly."""
    sites: dict[str, SiteMetrics]
    """Metrics by site, in the order of the forward pass."""
    spliced: dict[str, Predictions]
    """Predictions with several sites spliced at once: `all`, and each kind that has more than one site."""

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON-ready values; undefined numbers are None."""
        return {"schema_version": SCHEMA_VERSION, **without_nan(asdict(self))}

    def error_matters(self, site: str) -> float:
        """CE with the errors of all sites dropped − CE with this site's error kept: what it is worth downstream."""
        ce = self.sites[site].ce_error_kept
        return math.nan if ce is None else self.spliced["all"].ce - ce

    def to_frame(self) -> pd.DataFrame:
        """A row for each site alone, then one for each group of sites spliced at once (`all sites`, `all resid`, ...),
        whose metrics of reconstruction are undefined.
        """
        import pandas as pd

        rows: list[dict[str, Any]] = []
        for name, metrics in self.sites.items():
            values = asdict(metrics)
            del values["density_histogram"], values["ce_error_kept"]
            rows.append({"site": name, **values, **self._predicted(metrics.predictions)})
            rows[-1] |= {"error_matters": self.error_matters(name)}
            del rows[-1]["predictions"]
        for name, predictions in self.spliced.items():
            group = "all sites" if name == "all" else f"all {name}"
            rows.append({"site": group, **self._predicted(predictions)})
        return pd.DataFrame(rows).set_index("site")

    def _predicted(self, predictions: Predictions) -> dict[str, float]:
        return {**asdict(predictions), "ce_added": predictions.ce - self.ce_model}

    def text(self) -> str:
        """Two tables of at most 80 characters a line: x̂ beside x at each site, and the model with x̂ in place of x."""
        frame = self.to_frame()
        rebuilt = frame.loc[list(self.sites), list(REBUILT)].rename(columns=REBUILT)
        spliced = frame[list(PREDICTED)].rename(columns=PREDICTED).rename_axis("spliced")
        plain = f"CE {self.ce_model:.3f} for the model itself, {self.ce_errors_kept:.3f} with every error kept"
        tables = [frame_text(rebuilt, {"L0": 1}), frame_text(spliced)]
        return "\n\n".join(tables) + f"\n{plain} ({self.n_tokens:,} tokens)"
