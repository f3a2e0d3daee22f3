"""Evaluation of a sweep's dictionaries on text they were not trained on: sparsity against fidelity.

1. All configs of a sweep are measured together (`sae.evaluation.evaluate.Evaluator`): a batch of text goes through
   the model once as it is and once with zeros at each site, whatever the number of configs, then once for each
   dictionary.
2. The sums go to `OUT/unfinished_evaluation.safetensors` between batches, so that a run that was interrupted goes on
   there and ends in the same bits. The file says what it belongs to: model, text, and a digest of the dictionaries.
3. Results go to NAME/saes/evaluation.json with what they were measured on. What is there is not measured again.
4. Held out is the text that is given, else what comes in the training text after the documents that were read.
5. `SweepResults` has a row a config and site (`sae.evaluation.sweep_results`); `sae.evaluation.sweep_plots` draws it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from sae._files import (
    check_digest,
    parse_json,
    read_header,
    read_json,
    read_tensors,
    write_json,
    write_tensors,
)
from sae._progress import ProgressBar
from sae._run.contents import clean, sweep_layout
from sae._run.outputs import check_no_link
from sae.autoencoder import SAE_CONFIG_FILE, WEIGHTS_FILE
from sae.data.batches import context_of, token_batches
from sae.data.cache import CachedModel
from sae.data.text import TextSource
from sae.errors import UserError
from sae.evaluation.evaluate import Evaluator
from sae.evaluation.results import EVALUATION_FILE
from sae.evaluation.sweep_results import EvaluationFile, SweepResults, SweepRow, number, rows_of, spliced_of
from sae.model.checks import precision_of
from sae.model.language_model import LanguageModel
from sae.model.tokens import Tokens
from sae.saes import load_saes
from sae.training.sweep import Sweep

log = logging.getLogger(__name__)

UNFINISHED = "unfinished_evaluation.safetensors"
SAVING = 0.05
"""Largest share of the time that writing sums to disk may take."""
NAMES = ("model", "text")
"""Settings that other names of the same thing may differ in."""


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
        if not sweep.read.is_all and next(trained_on.read(start), None) is not None:
            return cls(trained_on, start, False)
        log.warning("the whole text was trained on: nothing of it is held out; give another text to measure on")
        return cls(trained_on, 0, True)


def evaluate_sweep(
    model: LanguageModel,
    sweep: Sweep,
    held_out: HeldOut,
    *,
    tokens: int = 50_000,
    context: int | None = None,
    batch_size: int = 16,
    progress: bool = False,
    overwrite: bool = False,
) -> SweepResults:
    """Measures every config that was not measured on this text before; goes on where a measurement was interrupted.

    Raises UserError, unless `overwrite`, where one was measured with other settings.
    """
    context = context_of(model, context)
    clean(sweep.out, sweep_layout([*sweep.configs]))
    measured_on = evaluation_settings(model, held_out.source, tokens=tokens, context=context, start=held_out.start)
    waiting = [name for name in sweep.configs if not same_measurement(_found(sweep.out, name), measured_on)]
    if not overwrite:
        check_measured(sweep.out, waiting, measured_on)
    begun = [name for name in _Unfinished.names_in(sweep) if name in waiting]
    for names in (begun, [name for name in waiting if name not in begun]):
        if not names:
            continue
        runs = {name: load_saes(sweep.run(name), sites=sweep.sites, device=model.device) for name in names}
        measurement = Evaluator(model, runs)
        unfinished = _Unfinished(sweep, tuple(names), {**measured_on, "batch_size": batch_size})
        unfinished.restore(measurement)
        texts = held_out.source.read(held_out.start)
        batches = token_batches(model, texts, max_tokens=tokens, batch_size=batch_size, context=context)
        with ProgressBar(total=tokens, desc=f"measure {len(names)} configs", unit="token", disable=not progress) as bar:
            _measure(measurement, batches, unfinished, bar.update)
        for name, result in measurement.results().items():
            write_json(_path(sweep.out, name), {**result.to_dict(), "measured_on": measured_on})
    (sweep.out / UNFINISHED).unlink(missing_ok=True)
    data = {name: _measured(sweep.out, name) for name in sweep.configs}
    any_one = next(iter(data.values()))
    return SweepResults(
        tuple(row for name, result in data.items() for row in rows_of(sweep, name, result)),
        {name: spliced_of(result) for name, result in data.items()},
        number(any_one["ce_model"]), any_one["n_tokens"], held_out.source.name, held_out.start, held_out.seen,
    )  # fmt: skip


def _measure(
    measurement: Evaluator, batches: Iterable[Tokens], unfinished: _Unfinished, advance: Callable[[int], object]
) -> None:
    """Adds the batches that are not in the sums yet, and writes the sums down as often as that costs little."""
    saved_at, took = -math.inf, 0.0
    for i, batch in enumerate(batches):
        if i >= measurement.n_batches:
            measurement.update(batch)
            if (now := time.monotonic()) - saved_at >= took / SAVING:
                unfinished.save(measurement)
                saved_at = time.monotonic()
                took = saved_at - now
        advance(int(batch.lengths.sum()))


def _path(out: Path, name: str) -> Path:
    """The file of a config's results."""
    return out / name / "saes" / EVALUATION_FILE


def _measured(out: Path, name: str) -> EvaluationFile:
    """The results of a config."""
    measured: EvaluationFile = read_json(_path(out, name), EvaluationFile)
    return measured


def _found(out: Path, name: str) -> dict[str, Any] | None:
    """The settings a config was measured with, None if it was not."""
    path = _path(out, name)
    measured_on = read_json(path).get("measured_on") if path.is_file() else None
    return measured_on if isinstance(measured_on, dict) else None


def check_measured(out: Path, names: Iterable[str], measured_on: Mapping[str, Any]) -> None:
    """UserError where a config of a sweep was measured with other settings than those that are given."""
    for name in names:
        _check_replaceable(out, name, measured_on)


def _check_replaceable(out: Path, name: str, measured_on: Mapping[str, Any]) -> None:
    """Check one config as `check_measured`. That of a sweep that read more of its text starts later."""
    path = _path(out, name)
    check_no_link(path)
    if not path.exists():
        return
    before = _found(out, name)
    if before is None:
        raise UserError(f"{str(path)!r} does not say what it was measured on and is not replaced: move it away")
    differing = [
        f"{key.replace('_', '-')} {before.get(key)!r}, not {value!r}"
        for key, value in measured_on.items()
        if before.get(key) != value and key not in (*NAMES, "start")
    ]
    if differing:
        raise UserError(
            f"{str(path)!r} holds a measurement with other settings ({', '.join(differing)}): give the same ones, or "
            "--resume --overwrite to replace it"
        )


@dataclass(frozen=True)
class _Unfinished:
    """A measurement that is under way, on disk between two batches."""

    sweep: Sweep
    """The sweep."""
    names: tuple[str, ...]
    """The configs that are measured together."""
    measured_on: Mapping[str, Any]
    """Everything else that the sums depend on."""

    @classmethod
    def names_in(cls, sweep: Sweep) -> list[str]:
        """The configs whose measurement was interrupted."""
        metadata = _metadata(sweep.out / UNFINISHED)
        names = parse_json(metadata.get("names", "[]"), UNFINISHED)
        return names if isinstance(names, list) else []

    @cached_property
    def digest(self) -> str:
        """Hash of the dictionaries, the text and the model, under whatever names."""
        settings = {key: value for key, value in self.measured_on.items() if key not in NAMES}
        digest = hashlib.sha256(json.dumps([self.names, settings]).encode())
        for name in self.names:
            for site in self.sweep.sites:
                folder = self.sweep.run(name) / "saes" / site.name
                for path in (folder / SAE_CONFIG_FILE, folder / WEIGHTS_FILE):
                    digest.update(hashlib.sha256(path.read_bytes()).digest())
        return digest.hexdigest()

    @property
    def path(self) -> Path:
        return self.sweep.out / UNFINISHED

    def restore(self, measurement: Evaluator) -> None:
        """Takes over the sums, if they belong to this measurement."""
        if _metadata(self.path).get("digest") != self.digest:
            return
        try:
            check_digest(self.path)
        except UserError as error:
            log.warning("measuring starts again: %s", error)
            return
        measurement.restore(read_tensors(self.path))
        log.info("measuring goes on after %d batches", measurement.n_batches)

    def save(self, measurement: Evaluator) -> None:
        """Puts the sums in the place of those before."""
        metadata = {"names": json.dumps(self.names), "digest": self.digest}
        write_tensors(self.path, measurement.state(), metadata=metadata, checksum=True)


def _metadata(path: Path) -> dict[str, str]:
    """The metadata of a safetensors file; nothing where there is none, or a damaged one."""
    try:
        return read_header(path)
    except UserError:
        return {}


def evaluation_settings(
    model: LanguageModel | CachedModel, source: TextSource, *, tokens: int, context: int, start: int = 0
) -> dict[str, Any]:
    """The settings of a measurement: everything it depends on beside the autoencoders, as far as a cache tells it."""
    return {
        "model": model.name,
        "model_fingerprint": model.fingerprint,
        **({} if isinstance(model, CachedModel) else precision_of(model)),
        "text": source.name,
        "text_fingerprint": source.fingerprint,
        "start": start,
        "tokens": tokens,
        "context": context,
    }


def same_measurement(one: dict[str, Any] | None, other: dict[str, Any]) -> bool:
    """Whether two measurements were made on the same text with the same model, under whatever names."""
    return one is not None and all(one.get(key) == other[key] for key in other if key not in NAMES)


def measured_rows(out: str, measured_on: Mapping[str, Any]) -> list[SweepRow]:
    """The rows of the finished sweep in a folder; UserError where it was measured in another model or on another text.

    Where it begins in the text, and how many tokens were measured, may differ; settings that are not given too.
    """
    sweep, rows = Sweep.load(out), list[SweepRow]()
    for name in sweep.configs:
        before = _found(sweep.out, name)
        if before is None:
            raise UserError(f"{str(sweep.out / name)!r} was not measured: run that sweep again with --resume")
        for key in ("model_fingerprint", "dtype", "quantize", "text_fingerprint", "context"):
            if key in measured_on and measured_on[key] != before.get(key):
                raise UserError(
                    f"{str(sweep.out / name)!r} was measured with {key.replace('_', '-')} {before.get(key)!r}, not "
                    f"{measured_on[key]!r}: scaling laws compare sweeps on one text in one model, give the same options"
                )
        rows += rows_of(sweep, name, _measured(sweep.out, name))
    return rows
