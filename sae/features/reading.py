"""Read the features of several dictionaries on every token of a text, and which text each token is of.

Shapes: N tokens that count, F features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sae.autoencoder import SparseAutoencoder, SparseFeatures
from sae.data.batches import counted_tokens, token_batches
from sae.data.text import TextSource
from sae.errors import UserError
from sae.model.language_model import LanguageModel
from sae.model.sites import Site


@dataclass(frozen=True)
class Reading:
    """Features on the tokens of a text that count, in reading order."""

    features: dict[Site, SparseFeatures]
    """Nonzero features by site, on the CPU."""
    token_ids: Tensor
    """[N] which token each is."""
    text: Tensor
    """[N] the number of its text."""
    position: Tensor
    """[N] its place among all tokens of that text, special ones counted."""
    texts: list[Tensor]
    """The tokens of each text, special ones among them."""

    @property
    def n_tokens(self) -> int:
        """N."""
        return len(self.token_ids)


@torch.no_grad()
def read_features(
    model: LanguageModel, saes: Mapping[Site, SparseAutoencoder], texts: str | Path | TextSource | Iterable[str],
    sites: Sequence[Site], *, max_tokens: int, batch_size: int, context: int | None,
    progress: Callable[[int], None] | None = None,
) -> Reading:  # fmt: skip
    """Read a text and encode it at some sites; UserError for an empty text. Options as in `find_groups`."""
    reads = {site: saes[site].config.read_site(site) for site in sites}
    of_batches: dict[Site, list[SparseFeatures]] = {site: [] for site in sites}
    ids, numbers, positions, rows, n_tokens = [], [], [], list[Tensor](), 0
    for tokens in token_batches(model, texts, max_tokens=max_tokens, batch_size=batch_size, context=context):
        tokens = tokens.to(model.device)
        counted = counted_tokens(model, tokens)
        activations = model.run(tokens, capture=set(reads.values()), need_logits=False).activations
        for site in sites:
            f = saes[site].encode_sparse(activations[reads[site]][counted])
            of_batches[site].append(SparseFeatures(f.token.cpu() + n_tokens, f.feature.cpu(), f.value.float().cpu()))
        ids.append(tokens.input_ids[counted].cpu())
        numbers.append(counted.nonzero()[:, 0].cpu() + len(rows))
        positions.append(tokens.position_ids[counted].cpu())
        rows += [row[mask.bool()].cpu() for row, mask in zip(tokens.input_ids, tokens.attention_mask, strict=True)]
        n_tokens += int(counted.sum())
        if progress is not None:
            progress(int(tokens.lengths.sum()))
    if not n_tokens:
        raise UserError("no tokens to look at features on: the text is empty")
    features = {
        site: SparseFeatures(*(torch.cat(column) for column in zip(*of_site, strict=True)))
        for site, of_site in of_batches.items()
    }
    return Reading(features, torch.cat(ids), torch.cat(numbers), torch.cat(positions), rows)
