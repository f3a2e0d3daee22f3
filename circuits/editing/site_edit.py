"""The edit of one site: x -> x' = x + sum_i s (f_i' - f_i) W_dec[i], at the tokens where feature i is edited.

A transcoder's features are computed from what it reads before the MLP, and written where it writes.

1. `FeatureReader` computes the edited features alone, from their encoder rows. Where features compete (top k), so it
   does at tokens at which none of the edited ones is above zero; at the others the encoder is read block by block until
   k features are above the highest edited one, and only tokens at which none of the blocks says so need all of it.
2. `Part` holds features that get the same treatment: f_i', at which tokens, and the strength s. All parts of a site
   read the same x, and their changes add up.

Shapes: B prompts, n columns, d model width, r width that is read (d but for transcoders), F features of a site, m
edited features, N tokens, R draws.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import linear

from circuits.editing.declaration import check_operation
from circuits.editing.targets import EVERYWHERE, GENERATED, Features
from circuits.options import EditedTokens, Operation
from sae.activation_functions import top_features
from sae.autoencoder import CHUNK_BYTES, SparseAutoencoder
from sae.errors import UserError
from sae.model.hook_points import Columns, SiteEdit
from sae.model.sites import Site
from sae.splice import edits_of

BLOCK_BYTES = 2**20
"""Bytes of encoder rows that are read at first, where features compete."""
MARGIN, LONGEST = 1.1, 0.75
"""How much more is read than a token seems to need; share of the encoder from which on all of it is read."""
ROW_PRIME, POSITION_PRIME = 1_000_003, 8_191
"""Tell tokens apart, so that each draws a value of its own, the same with and without a cache and in any batch."""


class FeatureReader:
    """f of the features `index` [m] of a dictionary: what it reads, [..., r] -> [..., m]."""

    def __init__(self, sae: SparseAutoencoder, index: Tensor) -> None:
        self.sae, self.index = sae, index.to(sae.device)
        self.competing = sae.nonlinearity.needs_k
        if self.competing:
            self.W_enc, self.b_enc = sae.W_enc[self.index], sae.b_enc[self.index]
            # Column of each feature in what is asked for; the last is for all others.
            self.column = torch.full((sae.config.n_features,), len(index), device=sae.device)
            self.column[self.index] = torch.arange(len(index), device=sae.device)
            on_cpu = sae.device.type == "cpu"  # elsewhere a product is quicker than a look at what came of it
            self.first_block = BLOCK_BYTES // (4 * sae.config.read_width) if on_cpu else sae.config.n_features
            self.rank_scale: Tensor | None = getattr(sae, "rank_scale", None)
        else:
            self.alone = sae.restrict(index)

    def __call__(self, x: Tensor) -> Tensor:
        if not self.competing:
            return self.alone.encode(x)
        tokens = self._centred(x.reshape(-1, x.shape[-1]))  # [N, r]
        f = tokens.new_zeros(len(tokens), len(self.index))
        bar = self._rank(linear(tokens, self.W_enc, self.b_enc).T, self.index).amax(0)  # [N] the highest edited feature
        for rows in torch.where(bar > 0)[0].split(max(1, CHUNK_BYTES // (4 * self.sae.config.n_features))):
            winners, z = self._undecided(tokens, bar, rows)
            if len(winners):
                f[winners] = self._among_all(z.T)
        return f.reshape(*x.shape[:-1], -1)

    def _centred(self, x: Tensor) -> Tensor:
        x = x.to(self.sae.W_enc.dtype)
        return x - self.sae.b_dec if self.sae.config.subtract_b_dec else x

    def _rank(self, z: Tensor, features: Tensor | slice) -> Tensor:
        """The score that features compete by, from their pre-activations z [n, N]."""
        return z if self.rank_scale is None else z * self.rank_scale[features, None]

    def _undecided(self, x: Tensor, bar: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Find those of the tokens `rows` of centred x [N, r] that have fewer than k features above the bar [N]: [n],
        and their z [F, n].

        The encoder is read in blocks, and a token leaves once enough features are above: k, and as many as are edited,
        since rounding may set one of these above itself. A block is as long as the token that is nearest needs if
        features go on to be above the bar as often as so far.
        """
        n_features, enough = self.sae.config.n_features, (self.sae.config.k or 0) + len(self.index)
        if len(rows) < len(x):
            x, bar = x[rows], bar[rows]
        above, blocks, seen, end = torch.zeros_like(rows), list[Tensor](), 0, self.first_block
        while seen < n_features:
            block = slice(seen, end)
            blocks.append(torch.addmm(self.sae.b_enc[block, None], self.sae.W_enc[block], x.T))  # [n, N]
            above = above + (self._rank(blocks[-1], block) > bar).sum(0)
            left = torch.where(above < enough)[0]
            if not len(left):
                return left, x
            if len(left) < len(rows):
                rows, x, bar, above = rows[left], x[left], bar[left], above[left]
                blocks = [z[:, left] for z in blocks]
            seen, needed = end, int(MARGIN * enough / max(1, int(above.max())) * end)
            end = max(needed, end + self.first_block // 2)
            end = end if end < LONGEST * n_features else n_features
        return rows, torch.cat(blocks)

    def _among_all(self, z: Tensor) -> Tensor:
        """[N, m] of all z [N, F]: the features that are among the k largest of their token."""
        assert self.sae.config.k is not None
        value, feature = top_features(z, self.sae.config.k, self.rank_scale)  # [N, k]
        return z.new_zeros(len(z), len(self.index) + 1).scatter(1, self.column[feature], value)[:, :-1]


class Prompts(Protocol):
    """The questions that a part asks of the prompts that are edited."""

    def inside(self, columns: Columns, span: str) -> Tensor:
        """[B, n] bool: which columns are tokens of a span."""

    def means(self, columns: Columns, part: Part) -> Tensor:
        """[B, n, m] the means of each token's place in its template, the part's own target where it has none."""


@dataclass(frozen=True)
class Part:
    """Features of one site that get the same treatment."""

    index: Tensor
    """[m] int64 their numbers."""
    operation: Operation
    """The operation on them."""
    target: Tensor | None = None
    """What `mean`, `set`, `clamp`, `scale` and `steer` refer to, [] or [m]; for `resample` values to draw, [R, m]."""
    table: object = None
    """Means by place in a template, for `Prompts.means`; `target` is taken where there are none."""
    span: str = EVERYWHERE
    """Span or position of the prompts, or `GENERATED`; empty for all tokens."""
    where: EditedTokens = "all"
    """At which tokens of these."""
    schedule: tuple[float, ...] = ()
    """Strength at each generated token, the last going on."""
    strength: float = 1.0
    """Strength throughout."""
    seed: int = 0
    """Seed of what `resample` draws."""

    @property
    def reads(self) -> bool:
        """Whether it depends on the features' values."""
        return self.operation != "steer" or self.where == "active"

    def change(self, f: Tensor, columns: Columns | None, prompts: Prompts | None) -> Tensor:
        """f' - f [..., m]."""
        if self.operation == "zero":
            return -f
        assert self.target is not None
        if self.operation == "steer":
            return self.target.expand(f.shape[-1])
        if self.operation == "scale":
            return (self.target - 1) * f
        if self.operation == "clamp":
            return torch.minimum(f, self.target.expand_as(f)) - f
        if self.operation == "resample":
            assert columns is not None
            return self.target[self._drawn(columns)] - f
        by_place = self.table is not None and columns is not None and prompts is not None
        return (prompts.means(columns, self) if by_place else self.target) - f  # type: ignore[union-attr, arg-type]

    def _drawn(self, columns: Columns) -> Tensor:
        """[B, n] which of the R values each token takes, by what the prompt says and where the token is."""
        assert self.target is not None
        tokens = columns.tokens
        row = (tokens.input_ids * tokens.attention_mask).sum(-1, keepdim=True)  # [B, 1]
        return (row * ROW_PRIME + columns.positions * POSITION_PRIME + self.seed) % len(self.target)

    def in_time(self, columns: Columns | None) -> Tensor | float | None:
        """Strength by prompt and generated token, [n, 1] or one number; None where no column is edited."""
        if columns is None:
            return self.strength
        steps = columns.steps
        later_only = GENERATED in (self.where, self.span)
        first_only = self.where == "prompt" or self.span not in (EVERYWHERE, GENERATED)
        if (steps[-1] < 0 and later_only) or (steps[0] >= 0 and first_only):
            return None
        if steps[-1] < 0 or not (later_only or first_only or self.schedule):
            return self.strength
        strengths = [float(not later_only) if step < 0 else 0.0 if first_only else self._at(step) for step in steps]
        return self.strength * torch.tensor(strengths, device=columns.tokens.input_ids.device)[:, None]

    def weight(
        self, in_time: Tensor | float, f: Tensor, columns: Columns | None, prompts: Prompts | None
    ) -> Tensor | float:
        """Strength at each token and feature, [B or 1, n, m or 1] or one number."""
        weight = in_time
        if columns is not None and self.span not in (EVERYWHERE, GENERATED):
            assert prompts is not None
            weight = prompts.inside(columns, self.span)[..., None] * weight
        return (f != 0) * weight if self.where == "active" else weight

    def _at(self, step: int) -> float:
        return self.schedule[min(step, len(self.schedule) - 1)] if self.schedule else 1.0


class SiteEdits:
    """All edits of one site."""

    def __init__(self, sae: SparseAutoencoder, parts: Sequence[Part]) -> None:
        self.parts = parts
        self.index = torch.cat([part.index for part in parts]).unique().to(sae.device)  # [m of all parts]
        self.reader = FeatureReader(sae, self.index) if any(part.reads for part in parts) else None
        columns = [torch.searchsorted(self.index, part.index.to(sae.device)) for part in parts]
        self.columns = [None if column.tolist() == [*range(len(self.index))] else column for column in columns]
        """Of each part, where its features are among all; None where these are all."""
        self.W_dec = [sae.W_dec[part.index.to(sae.device)] for part in parts]  # [m, d] each

    def __call__(
        self, x: Tensor, x_read: Tensor, columns: Columns | None = None, prompts: Prompts | None = None
    ) -> Tensor:
        """x' of x [B, n, d] and of what the dictionary reads [B, n, r]; without columns, every part at every token."""
        f, total = None, None
        for part, index, W_dec in zip(self.parts, self.columns, self.W_dec, strict=True):
            if (in_time := part.in_time(columns)) is None:
                continue
            if self.reader is not None and f is None:
                f = self.reader(x_read)  # [..., m of all parts]
            if f is None:
                of_part = x.new_zeros(*x.shape[:-1], len(W_dec))
            else:
                of_part = f if index is None else f[..., index]
            change = part.change(of_part, columns, prompts)
            weight = part.weight(in_time, of_part, columns, prompts)
            if isinstance(weight, Tensor) or weight != 1.0:
                change = weight * change
            total = change @ W_dec if total is None else total + change @ W_dec  # [..., d]
        return x if total is None else x + total.to(x.dtype)


def make_edits(
    saes: Mapping[Site, SparseAutoencoder],
    features: Features,
    *,
    operation: Operation = "zero",
    value: float | None = None,
    means: Mapping[Site, Tensor] | None = None,
) -> dict[Site, SiteEdit]:
    """Edits by site at every token, for `LanguageModel.run` and `LanguageModel.generate`.

    means: [m] by site, for `mean`. What `resample` draws depends on the token: see `circuits.editing.applied.edited`.
    """
    check_operation(operation, value)
    if operation == "mean" and means is None:
        raise UserError("the operation 'mean' needs the means of the features: see feature_means")
    if operation == "resample":
        raise UserError("the operation 'resample' has to know which token it is at: use edited(model, saes, edits)")
    constant = None if value is None else torch.tensor(float(value))
    targets = means if operation == "mean" and means is not None else dict.fromkeys(features, constant)
    edits = {
        site: SiteEdits(saes[site], [Part(index, operation, _on(targets[site], saes[site]))])
        for site, index in features.items()
    }
    return edits_of(saes, edits)


def _on(target: Tensor | None, sae: SparseAutoencoder) -> Tensor | None:
    return None if target is None else target.to(sae.device)
