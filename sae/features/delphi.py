"""The cache of activations that delphi (EleutherAI) explains and scores features from, and its explanations read back.

    FOLDER/resid_3/0_1637.safetensors    locations [n, 3] (row, position, feature − first), activations [n],
                                         tokens [rows, length]; features first to last of the file's name
    FOLDER/resid_3/config.json           model_name, cache_ctx_len, n_tokens, ...

delphi's `LatentDataset(raw_dir=FOLDER)` reads it, and takes a site for the name of a module. All rows have one length:
documents are joined, each with what the tokenizer puts in front of it, and what is left at the end is dropped.
Explanations are files `resid_3_latent120.txt`, a JSON string each; scores the same with what was predicted.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save_file
from torch import Tensor

from sae._files import atomic_write, prepare_folder, read_text, write_json
from sae.autoencoder import SparseAutoencoder
from sae.data.text import TextSource, read_texts
from sae.errors import UserError
from sae.model.language_model import LanguageModel
from sae.model.sites import Site
from sae.model.tokens import Tokens
from sae.saes import as_saes
from sae.splice import ensure_checked

N_SPLITS = 5
"""Files a site, as delphi makes them."""
ROWS_A_PASS = 32
DOCUMENTS_AT_ONCE = 64
SMALLEST = 1e-5
"""Smaller activations are left out, as delphi does."""
LARGEST = torch.finfo(torch.half).max
"""Its files are in float16; activations beyond that stand as the largest there is."""
_RESULT = re.compile(r"(?P<site>\w+)_latent(?P<feature>\d+)\.txt")


@torch.no_grad()
def write_delphi_cache(
    model: LanguageModel,
    saes: Mapping[Site, SparseAutoencoder],
    texts: str | Path | TextSource | Iterable[str],
    folder: str | Path,
    *,
    features: Mapping[Site, Sequence[int]] | None = None,
    n_tokens: int = 10**6,
    length: int = 256,
    overwrite: bool = False,
) -> Path:
    """Write delphi's cache of the features' activations on a text.

    Args:
        model, saes: the model, and dictionaries of it by site.
        texts: documents, a .txt or .jsonl file, or a hub data set.
        folder: where it goes; it must be empty unless `overwrite`.
        features: indices of the features that are kept, by site; all by default.
        n_tokens: tokens of the text that are read at most.
        length: tokens of a row.
        overwrite: whether files of these names are replaced.

    Returns:
        The folder.

    Raises:
        UserError: the text has fewer than `length` tokens, the model takes fewer, or the folder holds something.
    """
    saes = as_saes(saes)
    ensure_checked(model, saes)
    wanted = {site: None if features is None else torch.tensor(features.get(site, ())) for site in saes}
    rows = _rows(model, texts, n_tokens=n_tokens, length=length)
    folder = prepare_folder(folder, overwrite=overwrite)
    activations: dict[Site, list[tuple[Tensor, Tensor]]] = {site: [] for site in saes}
    reads = saes.read_sites(saes)
    for first in range(0, len(rows), ROWS_A_PASS):
        ids = rows[first : first + ROWS_A_PASS].to(model.device)
        run = model.run(Tokens(ids, torch.ones_like(ids)), capture=set(reads.values()), need_logits=False)
        for site, read in reads.items():
            token, feature, value = saes[site].encode_sparse(run.activations[read].flatten(0, 1))
            locations = torch.stack([first + token // length, token % length, feature], dim=1)  # [n, 3]
            chosen = value > SMALLEST
            if (only := wanted[site]) is not None:
                chosen &= torch.isin(feature, only.to(feature.device))
            activations[site].append((locations[chosen].cpu(), value[chosen].clamp(max=LARGEST).half().cpu()))
    source = str(texts) if isinstance(texts, str | Path | TextSource) else ""
    about: dict[str, Any] = {"dataset_repo": source, "dataset_split": "train", "dataset_name": ""}
    about |= {"dataset_column": "text", "batch_size": ROWS_A_PASS, "n_splits": N_SPLITS}
    about |= {"cache_ctx_len": length, "n_tokens": rows.numel(), "model_name": model.name}
    for site, of_batches in activations.items():
        locations, values = (torch.cat(column) for column in zip(*of_batches, strict=True))
        _write_site(folder / site.name, locations, values, rows, saes.config(site).n_features)
        write_json(folder / site.name / "config.json", about)
    return folder


def _rows(
    model: LanguageModel, texts: str | Path | TextSource | Iterable[str], *, n_tokens: int, length: int
) -> Tensor:
    """[rows, length] token ids: whole documents one behind the other, up to `n_tokens` of them."""
    if model.max_positions is not None and length > model.max_positions:
        raise UserError(f"a row has {length} tokens: model {model.name!r} takes {model.max_positions} at most")
    joined: list[int] = []
    documents = (text for text in read_texts(texts) if text.strip())
    while len(joined) < n_tokens and (chunk := list(islice(documents, DOCUMENTS_AT_ONCE))):
        joined += chain.from_iterable(model.tokenizer(chunk, verbose=False)["input_ids"])
    total = min(len(joined), n_tokens)
    if total < length:
        raise UserError(
            f"the text has {total} tokens, fewer than one row of {length}: give more text, or a shorter row"
        )
    return torch.tensor(joined[: total // length * length]).reshape(-1, length)


def _write_site(folder: Path, locations: Tensor, values: Tensor, rows: Tensor, n_features: int) -> None:
    """The files of a site, each with an equal share of its features."""
    bounds = torch.linspace(0, n_features, N_SPLITS + 1).long().tolist()
    small = max(len(rows), n_features) < 2**16
    for first, beyond in pairwise(bounds):
        inside = (locations[:, 2] >= first) & (locations[:, 2] < beyond)
        if beyond > first:
            where = locations[inside] - torch.tensor([0, 0, first])
            tensors = {
                "locations": where.numpy().astype(np.uint16 if small else np.uint32),
                "activations": values[inside].numpy(),
                "tokens": rows.numpy(),
            }
            with atomic_write(folder / f"{first}_{beyond - 1}.safetensors") as temporary:
                save_file(tensors, temporary)


def read_delphi_results(folder: str | Path) -> dict[str, Any]:
    """Read a folder of delphi's explanations or scores: feature name -> the JSON value of its file.

    Raises:
        UserError: no file is called `resid_3_latent120.txt` or the like, or one is damaged.
    """
    results = {}
    for path, match in _results(Path(folder)):
        try:
            results[f"{match['site']}/{int(match['feature'])}"] = json.loads(read_text(path))
        except ValueError:
            raise UserError(f"{path}: not the JSON of an explanation or of scores") from None
    if not results:
        raise UserError(f"{str(folder)!r} holds no results of delphi: files such as resid_3_latent120.txt")
    return results


def _results(folder: Path) -> Iterator[tuple[Path, re.Match[str]]]:
    if not folder.is_dir():
        raise UserError(f"no folder {str(folder)!r}: give the one that delphi wrote its results to")
    for path in sorted(folder.iterdir()):
        if match := _RESULT.fullmatch(path.name):
            yield path, match


def accuracy(result: Any) -> float | None:
    """The share of right predictions in a scorer's result, a list of objects with `correct`; None for another value."""
    judged = [entry.get("correct") for entry in result if isinstance(entry, dict)] if isinstance(result, list) else []
    right = [bool(value) for value in judged if value is not None]
    return sum(right) / len(right) if right else None
