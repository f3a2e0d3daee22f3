"""Changing what a model does through its features, and measuring what that did.

1. Choose features by name (`resid_3/120`, or at a span of the prompts alone `resid_3/120@subject`);
   `Circuit.strongest_features(n)` names the strongest of a circuit.
2. At each of their sites the activation x becomes x' = x + sum_i (f_i' - f_i) W_dec[i]. All other features and the
   error of the autoencoder stay as they are, so the edit does exactly what it says and nothing else:

   | operation | f_i' |
   |---|---|
   | `zero` | 0 |
   | `mean` | mean of f_i over reference text, or over the prompts |
   | `set` | value |
   | `scale` | value * f_i |
   | `steer` | f_i + value, whether the feature is active or not |

   f_i is read from the activation the edited model has at that point, at every position, in generation too.
3. Measure the behaviour before and after, overall and by case, the cross-entropy on other text, and sample
   continuations (`circuits.editing.measures`); beside it the same edit of equally many random features that are active
   on the prompts (several draws), without which no drop of the metric means anything.

Only the encoder rows of the edited features are computed; where features compete (top k) all of them must be.

Shapes: B prompts, S positions, d model width, F features of a site, n edited features of a site, N tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor

from circuits.editing.measures import continuations, measure
from circuits.editing.results import Behaviour, EditReport
from circuits.editing.targets import (
    EVERYWHERE,
    Features,
    PlacedEdits,
    feature_names,
    parse_features,
    split_by_place,
    tokens_at,
)
from circuits.metrics import metrics as behaviour
from circuits.prompts.dataset import PromptSet
from sae.autoencoder import SparseAutoencoder
from sae.data.batches import counted_tokens, token_batches
from sae.data.predictions import cross_entropy
from sae.errors import UserError, unknown
from sae.model.sites import Site
from sae.saes import as_saes
from sae.splice import ensure_checked

if TYPE_CHECKING:
    from sae.model.language_model import LanguageModel, Tokens

Operation = Literal["zero", "mean", "set", "scale", "steer"]

NEEDS_VALUE = ("set", "scale", "steer")

PlacedFeatures = Mapping[str, Features]
"""Chosen features by place."""


# ------------------------------------------------------------------------------------------ random features


def active_features(
    model: LanguageModel,
    saes: Mapping[Site, SparseAutoencoder],
    prompts: PromptSet,
    *,
    place: str = EVERYWHERE,
    batch_size: int = 64,
) -> dict[Site, Tensor]:
    """Features that are active on at least one token of the clean prompts (special tokens aside), by site; place: on
    at least one of its tokens.
    """
    found: dict[Site, list[Tensor]] = {site: [] for site in saes}
    for batch in prompts.batches(batch_size):
        for site, x in _real_activations(model, batch.clean, saes, tokens_at(batch, place)).items():
            found[site].append(saes[site].encode_sparse(x).feature.unique())
    return {site: torch.cat(parts).unique().cpu() for site, parts in found.items()}


def random_features(
    active: Features, like: Features, *, generator: torch.Generator, same_sites: bool = True
) -> dict[Site, Tensor]:
    """As many active features as in `like`, none of them in `like`, drawn uniformly without replacement.

    same_sites: as many at each site as `like` has there; otherwise from all sites together, where the sites of many
    active features get many.
    """
    pools = {site: index[~torch.isin(index, like[site])] if site in like else index for site, index in active.items()}
    if same_sites:
        drawn = {site: _draw(pools[site], len(index), generator) for site, index in like.items()}
        return {site: index for site, index in drawn.items() if len(index)}
    owners = torch.cat([torch.full((len(index),), rank) for rank, index in enumerate(pools.values())])
    pooled = torch.cat(list(pools.values()))
    chosen = _draw(torch.arange(len(pooled)), sum(map(len, like.values())), generator)
    drawn = {site: pooled[chosen[owners[chosen] == rank]] for rank, site in enumerate(pools)}
    return {site: index for site, index in drawn.items() if len(index)}


def _draw(pool: Tensor, n: int, generator: torch.Generator) -> Tensor:
    return pool[torch.randperm(len(pool), generator=generator)[:n]].sort().values


# ------------------------------------------------------------------------------------------ the edit itself


class FeatureEdit:
    """x -> x' = x + sum_i (f_i' - f_i) W_dec[i] for the features `index` [n] of one site."""

    def __init__(self, sae: SparseAutoencoder, index: Tensor, operation: Operation, value: Tensor | None = None):
        self.index = index.to(sae.device)  # [n]
        self.operation = operation
        self.value = None if value is None else value.to(sae.device)  # [] or [n]
        self.competing = sae.nonlinearity.needs_k
        self.sae = sae if self.competing else sae.restrict(index)
        self.W_dec = sae.W_dec[self.index]  # [n, d]

    def features(self, x: Tensor) -> Tensor:
        """f of the edited features: x [..., d] -> [..., n]."""
        if not self.competing:
            return self.sae.encode(x)
        tokens = x.reshape(-1, x.shape[-1])  # [N, d]
        active = self.sae.encode_sparse(tokens)
        column = torch.full((self.sae.config.n_features,), -1, device=x.device)  # [F]
        column[self.index] = torch.arange(len(self.index), device=x.device)
        kept = column[active.feature] >= 0
        f = torch.zeros(len(tokens), len(self.index), device=x.device)  # [N, n]
        f[active.token[kept], column[active.feature[kept]]] = active.value[kept].float()
        return f.reshape(*x.shape[:-1], -1)

    def change(self, f: Tensor) -> Tensor:
        """f' - f [..., n]."""
        if self.operation == "zero":
            return -f
        assert self.value is not None
        if self.operation == "scale":
            return (self.value - 1) * f
        return self.value - f

    def __call__(self, x: Tensor) -> Tensor:
        if self.operation == "steer":
            assert self.value is not None
            return x + (self.value.expand(len(self.index)) @ self.W_dec).to(x.dtype)
        return x + (self.change(self.features(x)) @ self.W_dec).to(x.dtype)


def make_edits(
    saes: Mapping[Site, SparseAutoencoder],
    features: Features,
    *,
    operation: Operation = "zero",
    value: float | None = None,
    means: Mapping[Site, Tensor] | None = None,
) -> dict[Site, Callable[[Tensor], Tensor]]:
    """Edits by site, for `LanguageModel.run` and `LanguageModel.generate`. means: [n] by site, for `mean`."""
    check_operation(operation, value)
    if operation == "mean" and means is None:
        raise UserError("the operation 'mean' needs the means of the features: see feature_means")
    edits: dict[Site, Callable[[Tensor], Tensor]] = {}
    for site, index in features.items():
        if operation == "mean":
            assert means is not None
            target: Tensor | None = means[site]
        else:
            target = None if value is None else torch.tensor(float(value))
        edits[site] = FeatureEdit(saes[site], index, operation, target)
    return edits


def check_operation(operation: str, value: float | None) -> None:
    """`UserError` unless the operation is known and has a value exactly where it needs one."""
    if operation not in get_args(Operation):
        raise unknown("operation", operation, get_args(Operation))
    if operation in NEEDS_VALUE and value is None:
        raise UserError(f"the operation {operation!r} needs a value")
    if value is not None and not math.isfinite(value):
        raise UserError(f"value is {value}: it must be a finite number")
    if operation not in NEEDS_VALUE and value is not None:
        raise UserError(f"the operation {operation!r} takes no value (given {value}); {', '.join(NEEDS_VALUE)} do")


@torch.no_grad()
def feature_means(
    model: LanguageModel,
    saes: Mapping[Site, SparseAutoencoder],
    features: Features,
    batches: Sequence[Tokens],
    *,
    where: Sequence[Tensor] | None = None,
) -> dict[Site, Tensor]:
    """Mean of each chosen feature over all tokens (special tokens aside) of the batches, or those of `where` ([B, S]
    bool each): [n] by site.
    """
    readers = {site: FeatureEdit(saes[site], index, "zero") for site, index in features.items()}
    sums = {site: torch.zeros(len(index), device=as_saes(saes).device) for site, index in features.items()}
    n_tokens = 0
    for tokens, at in zip(batches, where or [None] * len(batches), strict=True):
        activations = _real_activations(model, tokens, features, at)
        n_tokens += len(next(iter(activations.values())))
        for site, x in activations.items():
            sums[site] += readers[site].features(x).sum(0)
    return {site: total / max(n_tokens, 1) for site, total in sums.items()}


def _real_activations(
    model: LanguageModel, tokens: Tokens, sites: Mapping[Site, object], where: Tensor | None = None
) -> dict[Site, Tensor]:
    """x [N, d] by site at the tokens (of `where` [B, S]) that are neither padding nor special."""
    real = counted_tokens(model, tokens)  # [B, S]
    real = real if where is None else real & where
    with torch.no_grad():
        run = model.run(tokens, capture=list(sites), need_logits=False)
    return {site: x[real] for site, x in run.activations.items()}


# ------------------------------------------------------------------------------------------ editing and measuring


def ablate(
    model: LanguageModel,
    saes: Mapping[Site, SparseAutoencoder],
    features: str | Sequence[str],
    prompts: PromptSet,
    *,
    operation: Operation = "zero",
    value: float | None = None,
    texts: Sequence[str] | None = None,
    generate: int = 0,
    new_tokens: int = 30,
    n_random: int = 5,
    same_sites: bool = True,
    seed: int = 0,
    metric: str | behaviour.Metric | None = None,
    batch_size: int = 64,
    max_length: int | None = None,
) -> EditReport:
    """Edit the features and report what that does to the behaviour, to other text and to continuations.

    features: names such as resid_3/120, or with a place resid_3/120@subject. texts: other text for the cross-entropy,
    and the reference of `mean`. generate: how many prompts to continue. metric: what is reported; for an edit through a
    circuit that circuit's own (`Circuit.get_metric`), the logit difference by default.
    n_random: draws of equally many random active features (see `random_features`) given the same edit.
    """
    check_operation(operation, value)
    chosen = {place: parse_features(names, saes) for place, names in split_by_place(features).items()}
    if texts and set(chosen) != {EVERYWHERE}:
        raise UserError("other text has no spans of the prompts: leave it out, or edit features everywhere")
    ensure_checked(model, saes, {site for at in chosen.values() for site in at})
    in_order = sorted(texts or [], key=len)
    other = list(token_batches(model, in_order, max_tokens=None, batch_size=16, context=max_length))
    m = behaviour.get_metric(metric or behaviour.logit_difference)
    prompts = behaviour.prepare(prompts, model, m)
    trial = _Trial(model, saes, prompts, other, operation, value, m, batch_size)
    draws = trial.random_features(chosen, n=n_random, same_sites=same_sites, seed=seed)
    wanted, drawn = _count(chosen), min(map(_count, draws), default=0)
    edits = trial.edits(chosen)
    return EditReport(
        features=_placed_names(chosen),
        operation=operation,
        value=value,
        metric=trial.metric_name,
        shares=behaviour.has_shares(m),
        n_prompts=len(prompts),
        n_texts=len(texts or []),
        before=trial.behaviour(PlacedEdits({})),
        after=trial.behaviour(edits),
        random=[trial.behaviour(trial.edits(draw)) for draw in draws if drawn],
        random_features=[_placed_names(draw) for draw in draws if drawn],
        random_left=drawn if n_random and drawn < wanted else None,
        continuations=continuations(model, prompts, edits, n=generate, new_tokens=new_tokens),
        seed=seed,
    )


@dataclass(frozen=True)
class _Trial:
    """One way to edit features: which at random beside the chosen ones, and what is measured of the edited model."""

    model: LanguageModel
    saes: Mapping[Site, SparseAutoencoder]
    prompts: PromptSet
    other: Sequence[Tokens]
    """Batches of other text."""
    operation: Operation
    value: float | None
    metric: behaviour.Metric
    batch_size: int

    @property
    def metric_name(self) -> str:
        """What the report calls what is measured."""
        return behaviour.metric_title(self.metric, self.prompts)

    def random_features(
        self, chosen: PlacedFeatures, *, n: int, same_sites: bool, seed: int
    ) -> list[dict[str, dict[Site, Tensor]]]:
        """n times as many random active features as are chosen, at the same places."""
        if not n:
            return []
        generator = torch.Generator().manual_seed(seed)
        active = {
            place: active_features(self.model, self.saes, self.prompts, place=place, batch_size=self.batch_size)
            for place in chosen
        }
        return [
            {
                place: random_features(active[place], like, generator=generator, same_sites=same_sites)
                for place, like in chosen.items()
            }
            for _ in range(n)
        ]

    def edits(self, features: PlacedFeatures) -> PlacedEdits:
        """The edits of features at their places."""
        return PlacedEdits({place: self._edits_at(place, here) for place, here in features.items()})

    def _edits_at(self, place: str, features: Features) -> dict[Site, Callable[[Tensor], Tensor]]:
        """`mean` is over the other text where there is any, else over the tokens of the place."""
        means = None
        if self.operation == "mean":
            batches = list(self.prompts.batches(self.batch_size))
            where = None if self.other else [tokens_at(batch, place) for batch in batches]
            text = self.other or [batch.clean for batch in batches]
            means = feature_means(self.model, self.saes, features, text, where=where)
        return make_edits(self.saes, features, operation=self.operation, value=self.value, means=means)

    def behaviour(self, edits: PlacedEdits) -> Behaviour:
        """The behaviour of the edited model, with the cross-entropy on the other text where there is any."""
        scores = measure(self.model, self.prompts, edits=edits, metric=self.metric, batch_size=self.batch_size)
        ce = cross_entropy(self.model, self.other, edits=edits(self.prompts[:1])) if self.other else None
        return replace(scores, ce=ce)


def _count(features: PlacedFeatures) -> int:
    return sum(len(index) for at in features.values() for index in at.values())


def _placed_names(features: PlacedFeatures) -> list[str]:
    return [f"{name}@{place}" if place else name for place, at in features.items() for name in feature_names(at)]
