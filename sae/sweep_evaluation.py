"""What each dictionary of a sweep is worth on text it was not trained on: sparsity against fidelity.

1. The dictionaries of a config are measured by `sae.evaluation`; the result goes to NAME/saes/evaluation.json with
   what it was measured on. Where that is there already, it is not measured again.
2. Held out is the text that is given, else what comes in the training text after the documents that were read.
3. `SweepResults` has a row a config and site, as JSON and as tables; `sae.sweep_plots` draws it.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

from sae.architectures import architecture
from sae.autoencoder import load_saes
from sae.evaluation import EVALUATION_FILE, evaluate
from sae.files import read_json, without_nan, write_json
from sae.model import LanguageModel
from sae.sweep import Sweep
from sae.tables import aligned, number
from sae.text import TextSource

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class HeldOut:
    """Text to measure on."""

    source: TextSource
    """The text."""
    start: int
    """Its first document that is read."""
    seen: bool
    """Whether the dictionaries were trained on it, because nothing was left."""

    @classmethod
    def of(cls, sweep: Sweep, trained_on: TextSource, text: TextSource | None = None) -> HeldOut:
        """The given text, else the rest of the training text, else that from its beginning."""
        if text is not None:
            return cls(text, 0, text.fingerprint == trained_on.fingerprint)
        start = sweep.read.documents
        if not sweep.read.whole and next(trained_on.read(start), None) is not None:
            return cls(trained_on, start, False)
        log.warning("the whole text was trained on: nothing of it is held out; give another text to measure on")
        return cls(trained_on, 0, True)


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


@dataclass(frozen=True)
class SweepResults:
    """What `evaluate_sweep` measured."""

    rows: tuple[SweepRow, ...]
    """One a config and site."""
    spliced: dict[str, dict[str, float]]
    """By config, with all sites spliced: ce, ce_recovered, kl."""
    ce_model: float
    """Cross-entropy of the model itself."""
    n_tokens: int
    """Tokens measured."""
    text: str
    """Text measured on."""
    start: int
    """First document of it."""
    seen: bool
    """Whether the dictionaries were trained on it."""

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON-ready values; undefined numbers are None."""
        return {"schema_version": 1, **without_nan(json.loads(json.dumps(asdict(self))))}

    @property
    def sites(self) -> list[str]:
        """Sites in the order of the forward pass."""
        return list(dict.fromkeys(row.site for row in self.rows))

    def lines(self, site: str | None = None) -> dict[tuple[str, int], dict[int, list[SweepRow]]]:
        """Rows by architecture and width, then by k; of one site or of all."""
        found: dict[tuple[str, int], dict[int, list[SweepRow]]] = {}
        for row in self.rows:
            if site in (None, row.site):
                found.setdefault((row.architecture, row.features), {}).setdefault(row.k, []).append(row)
        return found

    def summary(self) -> str:
        """A line for each architecture, width and k: means over sites and seeds."""
        cells = [["architecture", "features", "k", "L0", "EV", "CE recovered", "dead", "all spliced"]]
        for (name, width), by_k in self.lines().items():
            for k, rows in by_k.items():
                together = mean(self.spliced[config]["ce_recovered"] for config in {row.name for row in rows})
                cells.append([name, str(width), str(k), *_means(rows), number(together)])
        head = f"means over {len(self.sites)} sites and all seeds, {self.n_tokens:,} tokens of {self._where()}"
        return f"{head}\n{aligned(cells)}"

    def table(self) -> str:
        """The same for each site."""
        cells = [["site", "architecture", "features", "k", "L0", "EV", "CE recovered", "dead"]]
        for site in self.sites:
            for (name, width), by_k in self.lines(site).items():
                cells += [[site, name, str(width), str(k), *_means(rows)] for k, rows in by_k.items()]
        return aligned(cells, text_columns=2)

    def _where(self) -> str:
        after = f" from document {self.start:,} on" if self.start else ""
        return f"{self.text}{after}{', which they were trained on' if self.seen else ''}"


def evaluate_sweep(
    model: LanguageModel,
    sweep: Sweep,
    held_out: HeldOut,
    *,
    tokens: int = 50_000,
    context: int = 128,
    batch_size: int = 16,
    progress: Callable[[str, int, int], None] | None = None,
) -> SweepResults:
    """Measures every config that was not measured on this text before; `progress` gets name, number and count."""
    measured_on = evaluation_settings(model, held_out.source, tokens=tokens, context=context, start=held_out.start)
    rows: list[SweepRow] = []
    spliced: dict[str, dict[str, float]] = {}
    data: dict[str, Any] = {}
    for i, name in enumerate(sweep.configs, start=1):
        path = sweep.run(name) / "saes" / EVALUATION_FILE
        data = read_json(path) if path.is_file() else {}
        if not same_measurement(data.get("measured_on"), measured_on):
            if progress is not None:
                progress(name, i, len(sweep.configs))
            saes = load_saes(sweep.run(name), sites=sweep.sites, device=model.device)
            texts = held_out.source.read(held_out.start)
            result = evaluate(model, saes, texts, max_tokens=tokens, context=context, batch_size=batch_size)
            data = {**result.to_dict(), "measured_on": measured_on}
            write_json(path, data)
        rows += _rows(sweep, name, data)
        spliced[name] = {key: _number(data["spliced"]["all"][key]) for key in ("ce", "ce_recovered", "kl")}
    return SweepResults(
        tuple(rows), spliced, data["ce_model"], data["n_tokens"], held_out.source.name, held_out.start, held_out.seen
    )


def evaluation_settings(
    model: LanguageModel, source: TextSource, *, tokens: int, context: int, start: int = 0
) -> dict[str, Any]:
    """What a measurement depends on beside the autoencoders."""
    return {
        "model": model.name,
        "model_fingerprint": model.fingerprint,
        "text": source.name,
        "text_fingerprint": source.fingerprint,
        "start": start,
        "tokens": tokens,
        "context": context,
    }


def same_measurement(one: dict[str, Any] | None, other: dict[str, Any]) -> bool:
    """Whether two measurements were made on the same text with the same model, under whatever names."""
    names = ("model", "text")
    return one is not None and all(one.get(key) == other[key] for key in other if key not in names)


def _rows(sweep: Sweep, name: str, data: dict[str, Any]) -> list[SweepRow]:
    """The rows of a config, from its evaluation.json."""
    config = sweep.configs[name]
    return [
        SweepRow(
            name=name,
            architecture=config.architecture,
            features=found["n_features"],
            k=config.k if architecture(config.architecture).trained else found["n_features"],
            seed=config.seed,
            site=site,
            l0=_number(found["l0"]),
            explained_variance=_number(found["explained_variance"]),
            ce_recovered=_number(found["predictions"]["ce_recovered"]),
            kl=_number(found["predictions"]["kl"]),
            dead_fraction=_number(found["dead_fraction"]),
        )
        for site, found in data["sites"].items()
    ]


def _number(value: float | None) -> float:
    """JSON's null is undefined."""
    return math.nan if value is None else value


def _means(rows: Sequence[SweepRow]) -> list[str]:
    """L0, explained variance, CE recovered and dead fraction, means of what is defined."""
    columns = [[getattr(row, name) for row in rows] for name in ("l0", "explained_variance", "ce_recovered")]
    columns.append([row.dead_fraction for row in rows])
    return [number(mean(column), 1 if i == 0 else 3) for i, column in enumerate(columns)]


def mean(values: Iterable[float]) -> float:
    """Mean of the defined values."""
    defined = [value for value in values if not math.isnan(value)]
    return fmean(defined) if defined else math.nan
