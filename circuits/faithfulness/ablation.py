"""Values that nodes take when they are ablated, and runs of the model with only some nodes left in.

Legend: B prompts, S positions, d model width, n chosen features of a site.

At a site x = f W_dec + b_dec + e. With the ablation values f0, e0 and x0 = f0 W_dec + b_dec + e0, decoding being
affine,

    only the nodes C kept:  x' = x0 + sum_{i in C} (f_i - f0_i) W_dec[i]  (+ e - e0 if the error is in C)
    the nodes C removed:    x' = x  - sum_{i in C} (f_i - f0_i) W_dec[i]  (- e + e0 if the error is in C)

where f and e are recomputed from the x that arrives (a transcoder's f from what arrives where it reads), so what was
ablated before has its effect. What a skip connection writes is a node like the error. Ablation values:

- `mean`: mean over the reference prompts (clean and patch), group by group (circuits.prompts.alignment): the same
  template and position, or span and position in it.
- `optimal`: the constants with which the model does best without what is ablated
  (circuits.faithfulness.optimal_ablation), from the means.
- `mean-pooled`: one mean over all templates and positions. It destroys what all prompts share and tells little.
- `counterfactual`: the values of the pair's other prompt.
- `resample`: the values of a random reference prompt with the same template.
- `zero`: f0 = 0 and e0 = 0 (and nothing from a skip connection), so x0 = b_dec.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass

import torch

from circuits.attribution.activations import Setting
from circuits.attribution.nodes import Nodes, SiteNodes
from circuits.metrics.probe import ReadModel
from circuits.options import Ablation
from circuits.prompts.alignment import PositionGroups
from circuits.prompts.dataset import PromptSet
from sae.autoencoder import SparseAutoencoder
from sae.errors import UserError
from sae.model.hook_points import SiteEdit
from sae.model.language_model import Tokens
from sae.model.sites import Site
from sae.saes import as_saes
from sae.splice import ReadingEdit, edits_of


@dataclass(frozen=True)
class SiteValues:
    """Values of one site for a batch: x and e [B, S, d], the chosen features f [B, S, n], and what a skip connection
    writes [B, S, d], if there is one.
    """

    x: torch.Tensor
    error: torch.Tensor
    features: torch.Tensor
    skip: torch.Tensor | None = None

    @staticmethod
    def of(
        sae: SparseAutoencoder, x: torch.Tensor, index: torch.Tensor, x_read: torch.Tensor | None = None
    ) -> SiteValues:
        """Encode what is read for x [B, S, d], by default x, and keep the features `index` [n]."""
        x_read = x if x_read is None else x_read
        f, x_hat = sae.encode_and_reconstruct(x_read, index)
        x = x.to(x_hat)  # sums over prompts need more than 16 bits
        return SiteValues(x, x - x_hat, f, sae.skip(x_read) if sae.has_skip else None)

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> SiteValues:
        """The function of every tensor."""
        skip = None if self.skip is None else function(self.skip)
        return SiteValues(function(self.x), function(self.error), function(self.features), skip)


Values = dict[Site, SiteValues]


class NodeTable:
    """The features that any of several node sets names, so that they are gathered once: site -> sorted index [n]."""

    def __init__(self, saes: Mapping[Site, SparseAutoencoder], sets: Sequence[Nodes], *, sites: Sequence[Site]) -> None:
        self.sites = list(sites)
        self.index: dict[Site, torch.Tensor] = {}
        device = as_saes(saes).device
        for site in self.sites:
            named = [nodes[site].feature[nodes[site].is_feature] for nodes in sets if site in nodes]
            union = torch.cat(named).unique() if named else torch.empty(0, dtype=torch.long)
            self.index[site] = union.to(device)

    def masks(
        self, site: Site, nodes: SiteNodes | None, prompts: PromptSet
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """([B or 1, S or 1, n], and twice [B or 1, S or 1, 1]) floats: 1 where a feature, the error, and the skip
        connection belong to the set.
        """
        index = self.index[site]
        if nodes is None or len(nodes) == 0:
            none = index.new_zeros(1, 1, 1, dtype=torch.float)
            return index.new_zeros(1, 1, len(index), dtype=torch.float), none, none
        column, position = self.columns(site, nodes), nodes.position.to(index.device)
        width = len(index) + 2
        anywhere = position < 0
        if nodes.summed:
            table, row = torch.zeros(1, width, device=index.device), torch.zeros(1, 1, dtype=torch.long)
        else:
            row = nodes.token_positions(prompts)
            table = torch.zeros((len(nodes.spans) or row.shape[1]) + 1, width, device=index.device)
        table[position[~anywhere], column[~anywhere]] = 1
        table[:, column[anywhere]] = 1
        chosen = table[row]  # padding takes the last row, where no node is by its position
        return chosen[..., :-2], chosen[..., -2:-1], chosen[..., -1:]

    def columns(self, site: Site, nodes: SiteNodes) -> torch.Tensor:
        """[nodes] int64: where each is among the n features of the table, the error and the skip connection."""
        index = self.index[site]
        column = torch.searchsorted(index, nodes.feature.to(index.device))  # an error's F comes behind every feature
        return column + nodes.is_skip.to(index.device)


def ablation_edits(
    saes: Mapping[Site, SparseAutoencoder],
    table: NodeTable,
    nodes: Nodes,
    values: Values,
    prompts: PromptSet,
    *,
    keep: bool,
) -> dict[Site, SiteEdit]:
    """Edits for `LanguageModel.run` that keep only `nodes` (or, with `keep` false, remove them) at the table's
    sites.
    """

    def edit_of(site: Site) -> ReadingEdit:
        index, ablated = table.index[site], values[site]
        features, error, skip = table.masks(site, nodes.get(site), prompts)
        with_error, with_skip = bool(error.any()), bool(skip.any())

        def edit(x: torch.Tensor, x_read: torch.Tensor) -> torch.Tensor:
            if not (keep or len(index) or with_error or with_skip):
                return x
            sae = saes[site]
            if with_error:
                f, x_hat = sae.encode_and_reconstruct(x_read, index)
                change = ((f - ablated.features) * features) @ sae.W_dec[index] + (x - x_hat - ablated.error) * error
            else:
                change = ((sae.encode_some(x_read, index) - ablated.features) * features) @ sae.W_dec[index]
            if with_skip and ablated.skip is not None:
                change = change + (sae.skip(x_read) - ablated.skip) * skip
            return (ablated.x + change if keep else x - change).to(x.dtype)

        return edit

    return edits_of(saes, {site: edit_of(site) for site in table.sites})


class AblationValues:
    """Ablation values for any batch of prompts, of one of the kinds above."""

    def __init__(
        self,
        setting: Setting,
        table: NodeTable,
        kind: Ablation,
        *,
        reference: PromptSet | None = None,
        seed: int = 0,
        batch_size: int = 64,
    ) -> None:
        if kind == "optimal" and isinstance(setting.model, ReadModel):
            raise UserError("ablation 'optimal' fits constants to the logits, and the metric is a probe: use mean")
        self.setting, self.table, self.kind = setting, table, kind
        self.reference = reference
        self.means: Values = {}
        self.tables: Values = {}
        self._rows: dict[str, list[int]] = defaultdict(list)
        self._generator = torch.Generator().manual_seed(seed)
        if kind not in ("counterfactual", "zero"):
            if reference is None:
                raise UserError(f"ablation {kind!r} needs reference prompts")
            for row, template in enumerate(reference.templates):
                self._rows[template].append(row)
            self.groups = PositionGroups(reference, pooled=kind == "mean-pooled")
        if kind in ("mean", "optimal", "mean-pooled"):
            self._collect_means(batch_size)

    @torch.no_grad()
    def _collect_means(self, batch_size: int) -> None:
        """Per site x and e [groups, d] and the chosen features [groups, n]: means over the tokens of every group."""
        assert self.reference is not None
        total: dict[Site, list[torch.Tensor]] = {}
        counts = torch.zeros(len(self.groups), 1, device=self.setting.model.device)
        for batch in self.reference.batches(batch_size):
            real = batch.clean.attention_mask.bool()
            group = self.groups.of(batch)[real]
            for tokens in [batch.clean] if batch.patch is None else [batch.clean, batch.patch]:
                counts.index_add_(0, group, torch.ones(len(group), 1, device=counts.device))
                for site, measured in self._of(tokens).items():
                    values = [value[real] for value in vars(measured).values() if value is not None]
                    sums = total.setdefault(site, [x.new_zeros(len(self.groups), x.shape[-1]) for x in values])
                    for of_groups, x in zip(sums, values, strict=True):
                        of_groups.index_add_(0, group, x)
        self.means = {site: SiteValues(*(x / counts for x in sums)) for site, sums in total.items()}
        self.tables = self.means

    @torch.no_grad()
    def _of(self, tokens: Tokens) -> Values:
        saes, index = self.setting.saes, self.table.index
        reads = saes.read_sites(self.table.sites)
        x = self.setting.model.run(tokens, capture={*reads, *reads.values()}, need_logits=False).activations
        return {site: SiteValues.of(saes[site], x[site], index[site], x[read]) for site, read in reads.items()}

    @torch.no_grad()
    def __call__(self, prompts: PromptSet) -> Values:
        """Values for a batch: every template of it must be covered."""
        if self.kind == "zero":
            batch, n_positions = len(prompts), prompts.clean.n_positions
            values = {}
            for site in self.table.sites:
                bias = self.setting.saes.bias(site)
                n, nothing = len(self.table.index[site]), torch.zeros_like(bias)
                values[site] = SiteValues(
                    bias.expand(batch, n_positions, -1), nothing, bias.new_zeros(1, 1, n), nothing
                )
            return values
        if self.kind == "counterfactual":
            if prompts.patch is None:
                raise UserError("ablation 'counterfactual' needs pairs: these prompts have no patch side")
            return self._of(prompts.patch)
        if self.kind == "resample":
            assert self.reference is not None
            rows = [self._draw(template) for template in prompts.templates]
            return self._of(_padded_to(self.reference.clean[rows], prompts.clean.n_positions))
        return self.at_groups(prompts, self.tables)

    def draw_state(self, state: torch.Tensor | None = None) -> torch.Tensor:
        """The state of the random draws; given an earlier state they go back there, and are the same again."""
        if state is not None:
            self._generator.set_state(state)
        return self._generator.get_state()

    def _draw(self, template: str) -> int:
        rows = self._rows[template]
        return rows[int(torch.randint(len(rows), (), generator=self._generator))]

    def at_groups(self, prompts: PromptSet, tables: Values) -> Values:
        """Values for a batch from tables of x and e [groups, d] and the chosen features [groups, n]; 0 at padding."""
        group = self.groups.of(prompts)  # [B, S]
        is_real = (group >= 0)[..., None]
        return {site: of_site.map(lambda table: table[group] * is_real) for site, of_site in tables.items()}

    def with_tables(self, tables: Values) -> AblationValues:
        """The same with other tables."""
        other = copy(self)
        other.tables = tables
        return other


def _padded_to(tokens: Tokens, n_positions: int) -> Tokens:
    """Left-padded tokens cut or padded to S columns; every row has at most S tokens."""
    missing = n_positions - tokens.n_positions
    if missing <= 0:
        return Tokens(tokens.input_ids[:, -n_positions:], tokens.attention_mask[:, -n_positions:])
    filler = tokens.input_ids.new_zeros(len(tokens), missing)
    return Tokens(torch.cat([filler, tokens.input_ids], 1), torch.cat([filler, tokens.attention_mask], 1))
