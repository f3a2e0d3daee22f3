"""Describe the features of a probe's circuit to a judge, and read how active they are on texts.

Shapes: B texts, S positions, m features of a site.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from circuits.debiasing.data import TextSet
from circuits.debiasing.results import JudgedFeature
from circuits.editing.site_edit import FeatureReader
from circuits.editing.targets import parse_features, split_by_span, tokens_at
from circuits.prompts.dataset import PromptSet
from sae.autoencoder import SparseAutoencoder
from sae.data.batches import counted_tokens
from sae.model.language_model import LanguageModel
from sae.model.sites import Site
from sae.saes import as_saes

SHOWN = 5
"""Contexts that are shown."""
BATCH = 64


@torch.no_grad()
def activations(
    model: LanguageModel, saes: Mapping[Site, SparseAutoencoder], names: Sequence[str], prompts: PromptSet
) -> Tensor:
    """Mean activation of each feature on each text, [B, n], over its span's tokens, or all but the special ones."""
    return _over_tokens(model, saes, names, prompts)[0]


@torch.no_grad()
def _over_tokens(
    model: LanguageModel, saes: Mapping[Site, SparseAutoencoder], names: Sequence[str], prompts: PromptSet
) -> tuple[Tensor, Tensor, Tensor]:
    """The mean, the largest activation and its column of each feature and text, [B, n] each."""
    column = {name: number for number, name in enumerate(names)}
    by_span = {span: parse_features(of_span, saes) for span, of_span in split_by_span(names).items()}
    sites = sorted({site for features in by_span.values() for site in features})
    mean, largest = torch.zeros(len(prompts), len(names)), torch.zeros(len(prompts), len(names))
    token = torch.zeros(len(prompts), len(names), dtype=torch.int64)
    for start in range(0, len(prompts), BATCH):
        batch = prompts[start : start + BATCH]
        reads = as_saes(saes).read_sites(sites)
        run = model.run(batch.clean, capture=reads.values(), need_logits=False)
        counted = counted_tokens(model, batch.clean)
        padding = prompts.clean.n_positions - batch.clean.n_positions
        for span, features in by_span.items():
            inside = counted & tokens_at(batch, span) if span else counted  # [B, S]
            for site, index in features.items():
                f = (
                    FeatureReader(saes[site], index)(run.activations[reads[site]]).float() * inside[..., None]
                )  # [B, S, m]
                chosen = [column[f"{site}/{feature}{'@' + span if span else ''}"] for feature in index.tolist()]
                rows = slice(start, start + len(batch))
                mean[rows, chosen] = (f.sum(1) / inside.sum(1, keepdim=True).clamp(min=1)).cpu()
                highest = f.max(1)
                largest[rows, chosen], token[rows, chosen] = highest.values.cpu(), highest.indices.cpu() + padding
    return mean, largest, token


def described(
    model: LanguageModel,
    saes: Mapping[Site, SparseAutoencoder],
    effects: Mapping[str, float],
    texts: TextSet,
    labels: Mapping[str, str],
) -> list[JudgedFeature]:
    """Features by name with their effects, as a judge sees them on some texts; labels: what they are called."""
    names = list(effects)
    mean, largest, token = _over_tokens(model, saes, names, texts.prompts)
    strings = [model.token_strings(row) for row in texts.prompts.clean.input_ids]
    real = texts.prompts.clean.attention_mask.bool().tolist()
    classes = sorted(set(texts.intended))
    of_class = {one: torch.tensor([label == one for label in texts.intended]) for one in classes}
    features = []
    for number, name in enumerate(names):
        order = largest[:, number].argsort(descending=True, stable=True)
        active = [row for row in order.tolist() if largest[row, number] > 0]
        at = {row: int(token[row, number]) for row in active}
        contexts = [_marked(strings[row], real[row], at[row]) for row in active[:SHOWN]]
        tokens = dict.fromkeys(strings[row][at[row]].strip() for row in active)
        by_class = {one: mean[mask, number].mean().item() for one, mask in of_class.items()}
        label = labels.get(name, labels.get(name.partition("@")[0], ""))
        features.append(JudgedFeature(name, effects[name], label, list(tokens)[: 2 * SHOWN], contexts, by_class))
    return features


def _marked(strings: Sequence[str], real: Sequence[bool], column: int) -> str:
    """A text with one of its tokens in «»."""
    pieces = [f"«{text}»" if number == column else text for number, text in enumerate(strings) if real[number]]
    return "".join(pieces).strip()
