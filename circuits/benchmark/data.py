"""Labelled texts for the tasks: one file, a folder of them, or the data of the package sae-probes.

1. A file is a data set: JSON lines or a table with a text (`circuits.debiasing.data.TEXT_KEYS`) and a label.
2. In a folder every file is one; NAME_train and NAME_test are the two halves of NAME.
3. sae-probes (Kantamneni et al. 2025, arXiv 2502.16681) keeps `cleaned_data/NUMBER_TAG.csv.zst` with the columns
   `prompt` and `target`, and `probing_datasets_MASTER.csv.zst`, which says which of them have classes to tell apart.
   Nothing of the package is imported: it needs no more than its files.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch

from circuits.benchmark.options import SuiteOptions
from circuits.debiasing.data import TEXT_KEYS, Labelled, held_out_rows, read_labelled
from circuits.prompts.files import file_rows
from circuits.prompts.formats import read_rows
from circuits.prompts.reader import by_kind
from sae.errors import UserError, unknown

SAE_PROBES = "sae-probes"
MASTER = "probing_datasets_MASTER.csv.zst"
WITH_CLASSES = ("Binary Classification", "Multiclass Classification")
LABEL_KEYS = ("label", "target", "intended")
SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".csv.zst")
MIN_OF_CLASS = 10
"""Texts that a class must have, to learn from and to test on together."""
MAX_CLASSES = 50
"""Labels with more values are numbers or names, not classes."""


@dataclass(frozen=True)
class DataSet:
    """Labelled texts of one task."""

    name: str
    """Its name."""
    train: list[Labelled]
    """Texts to learn from."""
    test: list[Labelled]
    """Texts to test on, of the same classes."""
    has_spurious: bool
    """Whether texts have a second label."""


def read_data_sets(source: str, options: SuiteOptions) -> Iterator[tuple[str, DataSet | str]]:
    """Every data set of a source with its name, one after the other; in place of one that is none, why."""
    for name, train, test in _files(source):
        yield name, _data_set(name, train, test, options)


def _files(source: str) -> list[tuple[str, str, str | None]]:
    """Names of data sets, and where their texts are: to learn from, and to test on."""
    kind, _, chosen = source.partition(":")
    if kind == SAE_PROBES and not Path(source).exists():
        return _of_sae_probes(_package_data(), chosen)
    folder = Path(kind)
    if folder.is_dir() and (folder / MASTER).is_file():
        return _of_sae_probes(folder, chosen)
    if not folder.is_dir() or chosen:
        return [(Path(source).name, source, None)]
    files = {_stem(path): str(path) for path in sorted(folder.iterdir()) if path.name.endswith(SUFFIXES)}
    if not files:
        raise UserError(
            f"no labelled texts in {source!r}: expected files with one of the endings {', '.join(SUFFIXES)}"
        )
    halves = {name.removesuffix("_train") for name in files if f"{name.removesuffix('_train')}_test" in files}
    paired = [(name, files[f"{name}_train"], files[f"{name}_test"]) for name in halves if f"{name}_train" in files]
    used = {path for _, *paths in paired for path in paths}
    return sorted([*paired, *((name, path, None) for name, path in files.items() if path not in used)])


def _stem(path: Path) -> str:
    return path.name.removesuffix(next(suffix for suffix in SUFFIXES if path.name.endswith(suffix)))


def _package_data() -> Path:
    spec = find_spec("sae_probes")
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            f"the data of {SAE_PROBES} are not there: pip install --no-deps sae-probes, or give the folder that holds "
            f"{MASTER}"
        )
    return Path(next(iter(spec.submodule_search_locations))) / "data"


def _of_sae_probes(folder: Path, chosen: str) -> list[tuple[str, str, str | None]]:
    """The data sets with classes, or those named by their tag or number_tag."""
    files = {}
    for row, where in file_rows(folder / MASTER):
        path = folder / f"{row.get('Dataset save name', '')}.zst"
        if row.get("Data type") in WITH_CLASSES and path.is_file():
            files[_stem(path)] = str(path)
        elif "Dataset save name" not in row or "Data type" not in row:
            raise UserError(f"{where}: no columns 'Dataset save name' and 'Data type', as {SAE_PROBES} has them")
    if not chosen:
        return [(name, path, None) for name, path in files.items()]
    names = {name.partition("_")[2]: name for name in files} | {name: name for name in files}
    asked = [name.strip() for name in chosen.split(",") if name.strip()]
    if missing := [name for name in asked if name not in names]:
        raise unknown(f"data set of {SAE_PROBES}", missing[0], names)
    return [(names[name], files[names[name]], None) for name in asked]


def _data_set(name: str, train: str, test: str | None, options: SuiteOptions) -> DataSet | str:
    first = next(read_rows(train, TEXT_KEYS, data_sets=True), None)
    if first is None:
        return "it holds no texts"
    row = first[0]
    label = options.label or next((key for key in LABEL_KEYS if row.get(key) is not None), None)
    if label is None:
        return f"its texts have none of the keys {', '.join(LABEL_KEYS)} (found {', '.join(sorted(row))}): give --label"
    spurious = options.spurious if row.get(options.spurious) is not None and label != options.spurious else None
    texts = read_labelled(train, intended=label, spurious=spurious)
    others = None if test is None else read_labelled(test, intended=label, spurious=spurious)
    counts = Counter(text.intended for text in texts)
    if len(counts) > MAX_CLASSES:
        return f"{len(counts)} values of {label!r} are no classes: at most {MAX_CLASSES} are probed"
    in_test = counts if others is None else Counter(text.intended for text in others)
    classes = {one for one, n in counts.items() if n >= MIN_OF_CLASS and in_test[one] >= 2}
    if len(classes) < 2:
        return f"fewer than two values of {label!r} have {MIN_OF_CLASS} texts"
    texts = [text for text in texts if text.intended in classes]
    if others is not None:
        others = [text for text in others if text.intended in classes]
        n_train = round(options.examples * (1 - options.test_share))
        return DataSet(name, _first(texts, n_train), _first(others, options.examples - n_train), spurious is not None)
    return DataSet(name, *_divided(_first(texts, options.examples), options), spurious is not None)


def _kinds(texts: Sequence[Labelled]) -> list[tuple[str, str]]:
    return [(text.intended, text.spurious) for text in texts]


def _first(texts: Sequence[Labelled], n: int) -> list[Labelled]:
    """At most n texts, of each class by its share."""
    return [texts[row] for row in sorted(by_kind(_kinds(texts))[:n])]


def _divided(texts: Sequence[Labelled], options: SuiteOptions) -> tuple[list[Labelled], list[Labelled]]:
    """Texts to learn from and to test on, `test_share` of each class, drawn at random; never one text on both sides."""
    generator = torch.Generator().manual_seed(options.seed)
    kinds = _kinds(texts)
    order = sorted(range(len(texts)), key=kinds.__getitem__)  # classes are drawn from by name
    by_kind = [texts[row] for row in order], [kinds[row] for row in order]
    test = {order[row] for row in held_out_rows(*by_kind, options.test_share, generator, least=1)}
    return [t for row, t in enumerate(texts) if row not in test], [texts[row] for row in sorted(test)]
