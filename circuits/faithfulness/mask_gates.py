"""The gates of a mask under training, the model run with them, and the loss: steps 1, 2 and 4 of `learned_mask`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from circuits.attribution.nodes import Nodes, count
from circuits.faithfulness.ablation import NodeTable, SiteEdit, SiteValues
from circuits.prompts.dataset import PromptSet
from sae.autoencoder import SparseAutoencoder
from sae.model.language_model import LanguageModel
from sae.model.sites import Site
from sae.splice import ReadingEdit, edits_of

GROUP = 16
"""Prompts whose mean metric is matched."""


class Gates:
    """Map gates of nodes to where they apply: nodes of all sites in one vector [N] -> per site [B, 1 or S, n] and gates
    of the error and of a skip connection, [B, 1 or S, 1] each, the same at all tokens of a node's position or span.
    """

    def __init__(
        self,
        saes: Mapping[Site, SparseAutoencoder],
        nodes: Nodes,
        *,
        errors: str = "nodes",
    ) -> None:
        self.saes, self.nodes, self.errors = saes, nodes, errors
        self.table = NodeTable(saes, [nodes], sites=list(nodes))
        self.n = count(nodes)
        self._members: dict[Site, tuple[torch.Tensor, torch.Tensor, int]] = {}
        first = 0
        for site, of_site in nodes.items():
            index = self.table.index[site]
            width = len(index) + 2  # the last columns are the gates of the error and of a skip connection
            column = self.table.columns(site, of_site)
            entry = of_site.position.to(index.device).clamp(min=0) * width + column
            self._members[site] = (torch.arange(first, first + len(of_site), device=index.device), entry, width)
            first += len(of_site)

    def of(self, site: Site, gates: torch.Tensor, prompts: PromptSet) -> tuple[torch.Tensor, ...]:
        """gates [B or 1, N] -> (features [B or 1, 1 or S, n], error and skip connection, [B or 1, 1 or S, 1] each)."""
        members, entry, width = self._members[site]
        nodes = self.nodes[site]
        row = torch.zeros(1, 1, dtype=torch.long) if nodes.summed else nodes.token_positions(prompts)  # [B or 1, S]
        n_rows = 1 if nodes.summed else (len(nodes.spans) or row.shape[1]) + 1  # the last, of padding, stays closed
        grid = gates.new_zeros(len(gates), n_rows * width).index_copy(1, entry, gates[:, members])
        grid = grid.view(len(gates), n_rows, width).expand(max(len(gates), len(row)), -1, -1)
        grid = grid[torch.arange(len(grid))[:, None], row]
        error = grid[..., -2:-1]
        if self.errors != "nodes":
            error = torch.full_like(error, float(self.errors == "keep"))
        return grid[..., :-2], error, grid[..., -1:]

    def scores(self, parameters: torch.Tensor) -> torch.Tensor:
        """The learned scores [N] themselves."""
        return parameters

    def clean_sites(self, model: LanguageModel) -> list[Site]:
        """The sites whose clean activations a run needs to begin at the first masked site."""
        earlier = [site for site in model.sites if site < self.table.sites[0]]
        blocks = [site for site in earlier if site.kind == "resid"]
        return [*blocks[-1:], *(site for site in earlier if not blocks or site > blocks[-1])]

    def logits(
        self, model: LanguageModel, openings: torch.Tensor, prompts: PromptSet, ablated: Mapping[Site, SiteValues],
        clean: Mapping[Site, torch.Tensor], *, grad: bool,
    ) -> torch.Tensor:  # fmt: skip
        """Logits after every prompt [B, V] with these openings [B or 1, N], begun at the first masked site."""
        skip = model.resume_from(self.table.sites[0], clean)
        return masked_logits(model, self, openings, prompts, ablated, skip=skip, grad=grad)

    def edits(self, gates: torch.Tensor, values: Mapping[Site, SiteValues], prompts: PromptSet) -> dict[Site, SiteEdit]:
        """Edits for `LanguageModel.run` under the gates [B or 1, N] of every prompt."""

        def edit_of(site: Site) -> ReadingEdit:
            sae, index, ablated = self.saes[site], self.table.index[site], values[site]
            features, error, skip = self.of(site, gates, prompts)
            with_error = self.errors == "keep" or bool(self.nodes[site].is_error.any())
            with_skip = bool(self.nodes[site].is_skip.any())

            def edit(x: torch.Tensor, x_read: torch.Tensor) -> torch.Tensor:
                f = sae.encode(x_read) if with_error else None
                chosen = sae.encode_some(x_read, index) if f is None else f[..., index]
                change = ((chosen - ablated.features) * features) @ sae.W_dec[index]
                if f is not None:
                    change = change + (x - sae.with_skip(sae.decode(f), x_read) - ablated.error) * error
                if with_skip and ablated.skip is not None:
                    change = change + (sae.skip(x_read) - ablated.skip) * skip
                return (ablated.x + change).to(x.dtype)

            return edit

        return edits_of(self.saes, {site: edit_of(site) for site in self.table.sites})


def budget_gates(scores: torch.Tensor, budgets: torch.Tensor, *, temperature: float) -> torch.Tensor:
    """Gates [B, N] of the scores [N] for a budget of budgets[b] nodes each; the threshold carries no gradient."""
    ordered = scores.detach().sort(descending=True).values
    ordered = torch.cat([ordered, ordered[-1:] - 20 * temperature])  # a budget of all N opens every gate
    threshold = (ordered[budgets - 1] + ordered[budgets]) / 2  # [B]
    return ((scores - threshold[:, None]) / temperature).sigmoid()


def masked_logits(
    model: LanguageModel,
    gates: Gates,
    openings: torch.Tensor,
    prompts: PromptSet,
    values: Mapping[Site, SiteValues],
    *,
    skip: Mapping[Site, torch.Tensor] | None = None,
    grad: bool = True,
) -> torch.Tensor:
    """Logits after every prompt [B, V] with these openings of the gates [B or 1, N]; skip: what comes before the first
    masked site, from the clean run.
    """
    planted = {site: x.detach().requires_grad_(grad) for site, x in (skip or {}).items()}
    edits = gates.edits(openings, values, prompts)
    return model.run(prompts.clean, edits=edits, skip=planted, grad=grad, last_only=True).logits[:, -1]


def mask_loss(off: torch.Tensor, budgets: torch.Tensor, cases: Sequence[str], *, match: str) -> torch.Tensor:
    """Mean over prompts of off^2, off = (m(C) - m(M)) / scale [B]; to match cases, off is first averaged over at most
    `GROUP` prompts of a case, neighbours by budget [B].
    """
    if match == "prompts":
        return off.square().mean()
    total = off.new_zeros(())
    for case in dict.fromkeys(cases):
        members = torch.tensor([other == case for other in cases], device=off.device).nonzero()[:, 0]
        ordered = members[budgets[members].argsort(stable=True)]
        groups = ordered.tensor_split(-(-len(ordered) // GROUP))
        total = total + sum(off[group].mean().square() * len(group) for group in groups)
    return total / len(off)
