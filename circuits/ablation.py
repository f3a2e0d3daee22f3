"""What a node becomes when it is taken out of the model, and how to run the model with only some nodes left in.

Legend: B prompts, S positions, d model width, n chosen features of a site.

At a site x = f W_dec + b_dec + e. With the ablation values f0, e0 and x0 = f0 W_dec + b_dec + e0, decoding being
affine,

    only the nodes C kept:  x' = x0 + sum_{i in C} (f_i - f0_i) W_dec[i]  (+ e - e0 if the error is in C)
    the nodes C removed:    x' = x  - sum_{i in C} (f_i - f0_i) W_dec[i]  (- e + e0 if the error is in C)

where f and e are recomputed from the x that arrives, so what was ablated before has its effect. Ablation values:

- `mean`: mean over the reference prompts (clean and patch) with the same template, position by position. A mean
  pooled over positions would destroy what all prompts share and tell nothing.
- `counterfactual`: the values of the pair's other prompt.
- `resample`: the values of a random reference prompt with the same template.
- `zero`: f0 = 0 and e0 = 0, so x0 = b_dec.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from circuits.nodes import Nodes, SiteNodes
from circuits.prompts import PromptSet
from sae.autoencoder import SparseAutoencoder
from sae.errors import UserError, unknown
from sae.model import LanguageModel, Tokens
from sae.sites import Site

ABLATIONS = ("mean", "counterfactual", "resample", "zero")


@dataclass(frozen=True)
class SiteValues:
    """Values of one site for a batch: x and e [B, S, d], and the chosen features f [B, S, n]."""

    x: torch.Tensor
    error: torch.Tensor
    features: torch.Tensor

    @staticmethod
    def of(sae: SparseAutoencoder, x: torch.Tensor, index: torch.Tensor) -> SiteValues:
        """Encode x [B, S, d] and keep the features `index` [n]."""
        f, x_hat = sae.encode_and_reconstruct(x, index)
        x = x.to(x_hat)  # sums over prompts need more than 16 bits
        return SiteValues(x, x - x_hat, f)


Values = dict[Site, SiteValues]


class NodeTable:
    """The features that any of several node sets names, so that they are gathered once: site -> sorted index [n]."""

    def __init__(self, saes: Mapping[Site, SparseAutoencoder], sets: Sequence[Nodes], *, sites: Sequence[Site]) -> None:
        self.sites = list(sites)
        self.index: dict[Site, torch.Tensor] = {}
        for site in self.sites:
            named = [nodes[site].feature[~nodes[site].is_error] for nodes in sets if site in nodes]
            union = torch.cat(named).unique() if named else torch.empty(0, dtype=torch.long)
            self.index[site] = union.to(saes[site].W_dec.device)

    def masks(self, site: Site, nodes: SiteNodes | None, lengths: torch.Tensor, n_positions: int):
        """([B or 1, S or 1, n], [B or 1, S or 1, 1]) floats: 1 where a feature, and the error, belongs to the set."""
        index = self.index[site]
        if nodes is None or len(nodes) == 0:
            return index.new_zeros(1, 1, len(index), dtype=torch.float), index.new_zeros(1, 1, 1, dtype=torch.float)
        feature, position = nodes.feature.to(index.device), nodes.position.to(index.device)
        is_error = nodes.is_error.to(index.device)
        summed = bool((position < 0).all())
        features = torch.zeros(1 if summed else n_positions, len(index), device=index.device)
        error = torch.zeros(1 if summed else n_positions, 1, device=index.device)
        row = position.clamp(min=0)
        features[row[~is_error], torch.searchsorted(index, feature[~is_error])] = 1
        error[row[is_error]] = 1
        if not summed and int(lengths.min()) != n_positions:
            raise UserError("a circuit by position needs prompts of the length it was found on")
        return features[None], error[None]


Edit = Callable[[torch.Tensor], torch.Tensor]


def ablation_edits(
    saes: Mapping[Site, SparseAutoencoder],
    table: NodeTable,
    nodes: Nodes,
    values: Values,
    tokens: Tokens,
    *,
    keep: bool,
) -> dict[Site, Edit]:
    """Edits for `LanguageModel.run` that keep only `nodes` (or, with `keep` false, remove them) at the table's
    sites.
    """

    def edit_of(site: Site) -> Edit:
        sae, index, at = saes[site], table.index[site], values[site]
        features, error = table.masks(site, nodes.get(site), tokens.lengths, tokens.n_positions)
        with_error = bool(error.any())

        def edit(x: torch.Tensor) -> torch.Tensor:
            if not keep and not len(index) and not with_error:
                return x
            if with_error:
                f, x_hat = sae.encode_and_reconstruct(x, index)
                change = ((f - at.features) * features) @ sae.W_dec[index] + (x - x_hat - at.error) * error
            else:
                change = ((sae.encode_some(x, index) - at.features) * features) @ sae.W_dec[index]
            return (at.x + change if keep else x - change).to(x.dtype)

        return edit

    return {site: edit_of(site) for site in table.sites}


class AblationValues:
    """Ablation values for any batch of prompts, of one of the kinds in `ABLATIONS`."""

    def __init__(
        self,
        model: LanguageModel,
        saes: Mapping[Site, SparseAutoencoder],
        table: NodeTable,
        kind: str,
        *,
        reference: PromptSet | None = None,
        seed: int = 0,
        batch_size: int = 64,
    ) -> None:
        if kind not in ABLATIONS:
            raise unknown("ablation", kind, ABLATIONS)
        self.model, self.saes, self.table, self.kind = model, saes, table, kind
        self.reference = reference
        self._means: dict[str, Values] = {}
        self._rows: dict[str, list[int]] = defaultdict(list)
        self._generator = torch.Generator().manual_seed(seed)
        if kind in ("mean", "resample"):
            if reference is None:
                raise UserError(f"ablation {kind!r} needs reference prompts")
            for row, template in enumerate(reference.templates):
                self._rows[template].append(row)
        if kind == "mean":
            self._collect_means(batch_size)

    def covers(self, template: str) -> bool:
        """Whether there is an ablation value for prompts of this template."""
        return self.kind in ("counterfactual", "zero") or template in self._rows

    @torch.no_grad()
    def _collect_means(self, batch_size: int) -> None:
        assert self.reference is not None
        for template, rows in self._rows.items():
            prompts = self.reference[rows]
            ends = [prompts.clean] if prompts.patch is None else [prompts.clean, prompts.patch]
            total: dict[Site, list[torch.Tensor]] = {}
            for tokens in ends:
                for start in range(0, len(tokens), batch_size):
                    for site, at in self._of(tokens[start : start + batch_size]).items():
                        sums = [part.sum(0) for part in (at.x, at.error, at.features)]
                        known = total.get(site)
                        total[site] = sums if known is None else [a + b for a, b in zip(known, sums, strict=True)]
            n = len(rows) * len(ends)
            self._means[template] = {site: SiteValues(*(part / n for part in sums)) for site, sums in total.items()}

    @torch.no_grad()
    def _of(self, tokens: Tokens) -> Values:
        run = self.model.run(tokens, capture=self.table.sites, need_logits=False)
        return {site: SiteValues.of(self.saes[site], x, self.table.index[site]) for site, x in run.activations.items()}

    @torch.no_grad()
    def __call__(self, prompts: PromptSet) -> Values:
        """Values for a batch: every template of it must be covered."""
        if self.kind == "zero":
            batch, n_positions = len(prompts), prompts.clean.n_positions
            values = {}
            for site in self.table.sites:
                bias = self.saes[site].b_dec
                n = len(self.table.index[site])
                values[site] = SiteValues(
                    bias.expand(batch, n_positions, -1), torch.zeros_like(bias), bias.new_zeros(1, 1, n)
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
        return self._stacked_means(prompts)

    def _draw(self, template: str) -> int:
        rows = self._rows[template]
        return rows[int(torch.randint(len(rows), (), generator=self._generator))]

    def _stacked_means(self, prompts: PromptSet) -> Values:
        n_positions = prompts.clean.n_positions
        values = {}
        for site in self.table.sites:
            means = [self._means[template][site] for template in prompts.templates]
            stacked = (
                torch.stack([_left_padded(getattr(mean, name), n_positions) for mean in means])
                for name in ("x", "error", "features")
            )
            values[site] = SiteValues(*stacked)
        return values


def _left_padded(x: torch.Tensor, n_positions: int) -> torch.Tensor:
    """[S', k] -> [S, k] with zeros in front."""
    return torch.cat([x.new_zeros(n_positions - len(x), *x.shape[1:]), x]) if len(x) < n_positions else x


def _padded_to(tokens: Tokens, n_positions: int) -> Tokens:
    """Left-padded tokens cut or padded to S columns; every row has at most S tokens."""
    missing = n_positions - tokens.n_positions
    if missing <= 0:
        return Tokens(tokens.input_ids[:, -n_positions:], tokens.attention_mask[:, -n_positions:])
    filler = tokens.input_ids.new_zeros(len(tokens), missing)
    return Tokens(torch.cat([filler, tokens.input_ids], 1), torch.cat([filler, tokens.attention_mask], 1))
