"""Controls that an edit is compared with beside random features: changes of equal norm, and random directions.

Shapes: B prompts, S positions, n columns, d model width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor
from torch.nn.functional import normalize

from circuits.prompts.dataset import PromptSet
from sae.model.hook_points import Columns, StandingEdit
from sae.model.language_model import LanguageModel
from sae.model.sites import READ_KINDS, Site

Standing = Mapping[Site, StandingEdit]


@torch.no_grad()
def change_norm(model: LanguageModel, batches: Iterable[PromptSet], edits: Callable[[PromptSet], Standing]) -> float:
    """The norm of all changes that the edits of each batch make to its clean prompts: sqrt(sum ||x' - x||^2) over all
    tokens and sites.
    """
    total = [0.0]

    def recording(edit: StandingEdit) -> StandingEdit:
        def recorded(x: Tensor, columns: Columns) -> Tensor:
            new = edit(x, columns)
            real = columns.tokens.attention_mask.bool()
            total[0] += float((new - x)[real].cpu().double().square().sum())
            return new

        return recorded

    for batch in batches:
        with model.edited({site: recording(edit) for site, edit in edits(batch).items()}):
            model.run(batch.clean, last_only=True)
    return total[0] ** 0.5


def random_directions(edits: Standing, widths: Mapping[Site, int], seed: int) -> dict[Site, StandingEdit]:
    """Edits that move each token as far as `edits` do, along one random direction a site."""
    generator = torch.Generator().manual_seed(seed)
    sites = [site for site in edits if site.kind not in READ_KINDS]
    drawn = {site: normalize(torch.randn(widths[site], generator=generator), dim=0) for site in sites}
    return {site: _along(edit, drawn[site]) if site in drawn else edit for site, edit in edits.items()}


def _along(edit: StandingEdit, direction: Tensor) -> StandingEdit:
    def moved(x: Tensor, columns: Columns) -> Tensor:
        distance = (edit(x, columns) - x).norm(dim=-1, keepdim=True)  # [B, n, 1]
        return x + distance * direction.to(x)

    return moved
