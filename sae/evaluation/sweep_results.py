"""Results of a sweep: a row a dictionary, means, and the laws that they follow, as JSON and as tables."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from typing_extensions import TypedDict

from sae._files import without_nan
from sae._frames import Result, frame_text
from sae.architectures import architecture
from sae.evaluation.scaling import ScalingLaw
from sae.training.sweep import Sweep

if TYPE_CHECKING:
    import pandas as pd

SHOWN = {"l0": "L0", "explained_variance": "EV", "ce_recovered": "CE recovered", "dead_fraction": "dead"}
"""Columns of the tables, by the metrics they show."""


@dataclass(frozen=True)
class SweepRow:
    """One dictionary."""

    name: str
    """Its config, and the folder of its run."""
    architecture: str
    """Architecture."""
    features: int
    """Features of the dictionary."""
    k: int
    """Active features that were asked for."""
    seed: int
    """Seed."""
    site: str
    """Site."""
    l0: float
    """Mean active features a token."""
    explained_variance: float
    """1 − Σ‖x − x̂‖² / Σ‖x − x̄‖²."""
    ce_recovered: float
    """(CE_zero − CE) / (CE_zero − CE_model) with this site alone spliced."""
    kl: float
    """Mean KL divergence from the model's predictions, in nats."""
    dead_fraction: float
    """Share of the features that never fired on the text."""
    tokens: int = 0
    """Tokens it was trained on."""


@dataclass(frozen=True)
class SweepResults(Result):
    """Metrics of every dictionary of a sweep."""

    rows: tuple[SweepRow, ...]
    """One a config and site."""
    spliced: dict[str, dict[str, float]]
    """By config, with all sites spliced: ce, ce_recovered, kl."""
    ce_model: float
    """Cross-entropy of the model itself."""
    n_tokens: int
    """Tokens measured."""
    measured_on: str
    """Text measured on."""
    start: int
    """First document of it."""
    seen: bool
    """Whether the dictionaries were trained on it."""
    laws: tuple[ScalingLaw, ...] = ()
    """How fidelity depends on width, sparsity and tokens, by architecture and site."""

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON-ready values; undefined numbers are None."""
        data = {"text" if key == "measured_on" else key: value for key, value in asdict(self).items()}
        return {"schema_version": 1, **without_nan(json.loads(json.dumps(data)))}

    @property
    def sites(self) -> list[str]:
        """Sites in the order of the forward pass."""
        return list(dict.fromkeys(row.site for row in self.rows))

    def to_frame(self) -> pd.DataFrame:
        """A row a config and site."""
        import pandas as pd

        return pd.DataFrame([asdict(row) for row in self.rows])

    def summary(self) -> str:
        """A line for each architecture, width and k: means over sites and seeds."""
        means = self._means(["architecture", "features", "k"])
        together = self.to_frame()[["name", "architecture", "features", "k"]].drop_duplicates()
        together["all spliced"] = [self.spliced[name]["ce_recovered"] for name in together.pop("name")]
        keys = ["architecture", "features", "k"]
        means["all spliced"] = together.groupby(keys, sort=False)["all spliced"].mean().to_numpy()
        sites = f"{len(self.sites)} sites" if len(self.sites) > 1 else self.sites[0]
        head = f"means over {sites} and all seeds, {self.n_tokens:,} tokens of {self._where()}"
        return f"{head}\n{frame_text(means, {'L0': 1})}"

    def text(self) -> str:
        """A line for each site, architecture, width and k: means over seeds."""
        return frame_text(self._means(["site", "architecture", "features", "k"]), {"L0": 1})

    def laws_text(self) -> str:
        """A line for each scaling law, with standard errors; nothing where the grid is too small for any."""
        head = "L = exp(α + β_n ln n + β_k ln k + γ ln n ln k + β_T ln T) + exp(ζ + η ln k); the odds if dead"
        lines = [f"{law.architecture} at {law.site}, {law.metric}: {law.text()}" for law in self.laws]
        return "\n".join([head, *lines]) if lines else ""

    def _means(self, keys: list[str]) -> pd.DataFrame:
        """Means of what is defined over all rows that share the keys."""
        frame = self.to_frame()
        if "site" in keys:
            frame = frame.sort_values("site", key=lambda names: names.map(self.sites.index), kind="stable")
        return frame.groupby(keys, sort=False)[list(SHOWN)].mean().rename(columns=SHOWN).reset_index()

    def _where(self) -> str:
        after = f" from document {self.start:,} on" if self.start else ""
        return f"{self.measured_on}{after}{', which they were trained on' if self.seen else ''}"


class PredictionsFile(TypedDict):
    """Metrics of predictions in evaluation.json; null where one is undefined."""

    ce: float | None
    ce_recovered: float | None
    kl: float | None


class SiteMetricsFile(TypedDict):
    """Metrics of the dictionary of a site in evaluation.json."""

    n_features: int
    l0: float | None
    explained_variance: float | None
    dead_fraction: float | None
    predictions: PredictionsFile


class SplicedFile(TypedDict):
    """Predictions with dictionaries spliced in."""

    all: PredictionsFile
    """At all sites together."""


class EvaluationFile(TypedDict):
    """evaluation.json of a config, as far as a sweep reads it."""

    n_tokens: int
    ce_model: float | None
    sites: dict[str, SiteMetricsFile]
    spliced: SplicedFile


def rows_of(sweep: Sweep, name: str, data: EvaluationFile) -> list[SweepRow]:
    """The rows of a config, from its evaluation.json."""
    config = sweep.configs[name]
    return [
        SweepRow(
            name=name,
            architecture=config.architecture,
            features=metrics["n_features"],
            k=config.k if architecture(config.architecture).trained else metrics["n_features"],
            seed=config.seed,
            site=site,
            l0=number(metrics["l0"]),
            explained_variance=number(metrics["explained_variance"]),
            ce_recovered=number(metrics["predictions"]["ce_recovered"]),
            kl=number(metrics["predictions"]["kl"]),
            dead_fraction=number(metrics["dead_fraction"]),
            tokens=config.tokens,
        )
        for site, metrics in data["sites"].items()
    ]


def spliced_of(data: EvaluationFile) -> dict[str, float]:
    """Predictions of a config with all sites spliced, from its evaluation.json."""
    together = data["spliced"]["all"]
    return {
        "ce": number(together["ce"]),
        "ce_recovered": number(together["ce_recovered"]),
        "kl": number(together["kl"]),
    }


def number(value: float | None) -> float:
    """JSON's null is undefined."""
    return math.nan if value is None else value
