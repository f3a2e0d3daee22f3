"""How a run was made: its facts, how sure they are, and the command lines that make it again, from `config.json`."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from circuits.report.files import RunFiles
from graphs.sharing import without_folders
from sae.model.sites import Site
from sae.training.config import TrainConfig

NOT_FACTS = (
    "cases", "completeness", "digest", "errors", "example_pairs", "metric_fingerprint", "need_spans", "path_nodes",
    "schema_version", "sites", "skips", "span_words", "templates", "title", "tokens", "total_effect",
    "last_span", "uncertainty", "verification",
)  # fmt: skip
"""Metadata that another section shows, or that say nothing to a reader."""
FACT_NAMES = {
    "n_examples": "prompts used",
    "n_positions": "longest prompt, tokens",
    "n_nodes": "nodes with an effect",
    "m_clean": "metric, clean",
    "m_patch": "metric, patch",
    "rejected": "prompts skipped",
    "positions": "spans",
}


ORDER = ("train", "finetune", "evaluate", "discover", "faithfulness", "validate", "mask", "edit")
"""Commands as they follow one another."""


def command_lines(config: Mapping[str, Any], run: Path) -> list[str]:
    """The commands of a run, in the order in which one needs what another left; the run folder is `RUN`, other files
    stand without the folders they are in.
    """
    entries = [(name, entry) for name, entry in config.items() if isinstance(entry, dict)]
    entries.sort(key=lambda item: ORDER.index(kind) if (kind := item[0].split()[0]) in ORDER else len(ORDER))
    lines = []
    for name, entry in entries:
        if isinstance(words := entry.get("words"), list):
            lines.append(shlex.join(_without_folders(str(word), run) for word in words))
        elif name == "train":
            words = ["sfc", "train", *_training_words(entry)]
            lines.append(shlex.join(_without_folders(word, run) for word in words))
    return lines


def _without_folders(word: str, run: Path) -> str:
    if "/" in word and Path(word).resolve() == run.resolve():
        return "RUN"
    return str(without_folders(word))


def _training_words(entry: Mapping[str, Any]) -> Iterator[str]:
    """Options of `sfc train` that are not at their default."""
    for name in ("model", "text", "cache"):
        if isinstance(entry.get(name), str):
            yield from (f"--{name}", entry[name])
    yield from ("--out", "RUN")
    config = entry.get("config")
    for option in fields(TrainConfig):
        value = config.get(option.name) if isinstance(config, dict) else None
        if value is None or value == (None if option.default is MISSING else option.default):
            continue
        name = option.name.replace("_", "-")
        if isinstance(value, bool):
            yield f"--{name}" if value else f"--no-{name}"
        else:
            yield from (f"--{name}", str(value))


def provenance(run: RunFiles) -> list[tuple[str, Any]]:
    """The model, dictionaries and options that the circuit was made with: names and JSON values."""
    metadata = run.graph.metadata if run.graph else {}
    facts = [
        (FACT_NAMES.get(key, key.replace("_", " ")), value)
        for key, value in metadata.items()
        if key not in NOT_FACTS and value not in ({}, [], None)
    ]
    versions = run.config.get("versions")
    if isinstance(versions, dict):
        facts.append(("versions", versions))
    if run.saes:
        kinds: dict[str, list[Site]] = {}
        for config in run.saes:
            kinds.setdefault(_sae_text(config), []).append(Site.parse(config["site"]))
        texts = [f"{len(sites)}: {kind} at {', '.join(map(str, sorted(sites)))}" for kind, sites in kinds.items()]
        facts.append(("autoencoders", "; ".join(texts)))
    return facts


def sure(run: RunFiles) -> list[str]:
    """How sure the effects are, a sentence each: intervals, halves of the prompts, exact patching."""
    metadata = run.graph.metadata if run.graph else {}
    sentences = []
    drawn = metadata.get("uncertainty")
    if isinstance(drawn, dict) and isinstance(drawn.get("n_distinguishable"), int):
        sentences.append(
            f"By drawing {drawn.get('drawn', 'the prompts')} anew, {drawn['n_distinguishable']} of "
            f"{metadata.get('n_nodes', '?')} nodes and {drawn.get('n_distinguishable_edges', '?')} of "
            f"{drawn.get('n_edges', '?')} edges are distinguishable from zero."
        )
    checked = metadata.get("verification")
    if isinstance(checked, dict) and isinstance(checked.get("summary"), str):
        sentences.append(f"{checked['summary'][:1].upper()}{checked['summary'][1:]}.")
    return sentences


def _sae_text(config: dict[str, Any]) -> str:
    k = f", k = {config['k']:g}" if config.get("k") else ""
    read = f" (transcoder, reads {config['read']})" if config.get("read") else ""
    return f"{config.get('architecture')} with {config.get('n_features')} features{k}{read}"
