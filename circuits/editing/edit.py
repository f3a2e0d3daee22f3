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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from circuits.circuit import Circuit, FeatureNames
from circuits.editing.measures import continuations, measure
from circuits.editing.random_features import active_features, random_features
from circuits.editing.results import Behaviour, EditReport
from circuits.editing.targets import (
    EVERYWHERE,
    Features,
    SpanEdits,
    counted_activations,
    feature_names,
    parse_features,
    split_by_span,
    tokens_at,
)
from circuits.metrics.metrics import Metric, get_metric, has_shares, logit_difference, metric_title, prepare
from circuits.options import Operation
from circuits.prompts.dataset import PromptSet
from sae.autoencoder import SparseAutoencoder
from sae.data.batches import token_batches
from sae.data.predictions import cross_entropy
from sae.errors import UserError, unknown
from sae.model.hook_points import SiteEdit
from sae.model.language_model import LanguageModel, Tokens
from sae.model.sites import Site
from sae.saes import as_saes
from sae.splice import ensure_checked

NEEDS_VALUE = ("set", "scale", "steer")

SpanFeatures = Mapping[str, Features]
"""Edited features by the span or position of the prompts where they are edited; under "" those edited everywhere."""


@dataclass(frozen=True)
class Edit:
    """Which features become what, and where.

    Raises:
        UserError: For an unknown operation, or a value that is missing, not finite or not needed.
    """

    features: str | Sequence[str]
    """Names such as `resid_3/120`, comma-separated or in a list; `resid_3/120@subject` at a span of the prompts alone,
    `resid_3/120@5` at a position.
    """
    operation: Operation = "zero"
    """What the features become: see the head of this module."""
    value: float | None = None
    """Of `set`, `scale` and `steer`, in units of the feature's activation, for `scale` a factor."""

    def __post_init__(self) -> None:
        check_operation(self.operation, self.value)

    def by_span(self, saes: Mapping[Site, SparseAutoencoder]) -> dict[str, dict[Site, Tensor]]:
        """The edited features by span and site."""
        return {span: parse_features(names, saes) for span, names in split_by_span(self.features).items()}


@dataclass(frozen=True)
class EditOptions:
    """What is measured of an edited model, and with what it is compared."""

    texts: Sequence[str] = ()
    """Other text for the cross-entropy, and the reference of `mean`."""
    generate: int = 0
    """Prompts that are continued before and after."""
    new_tokens: int = 30
    """Length of a continuation."""
    n_random: int = 5
    """Draws of as many random active features, given the same edit."""
    same_sites: bool = True
    """Whether as many are drawn at each site as are edited there; else from all sites together."""
    seed: int = 0
    """Seed of the draws."""
    batch_size: int = 64
    """Prompts that go through the model at once."""


# ------------------------------------------------------------------------------------------ the front door


def ablate(
    features: FeatureNames | Sequence[str] | str,
    prompts: PromptSet | None = None,
    *,
    circuit: Circuit | None = None,
    operation: Literal["zero", "mean", "set"] = "zero",
    value: float | None = None,
    options: EditOptions | None = None,
) -> EditReport:
    """Take features out of the model, or fix their value, and measure what becomes of the behaviour.

    Args:
        features: `circuit.strongest_features(n)`, or names (see `Edit.features`) of features of `circuit`.
        prompts: What to measure on, best held out; the prompts the circuit was found on by default.
        circuit: The circuit, whose model, SAEs and metric are used; where `features` do not know it.
        operation: `zero`, `mean` (over `options.texts`, else over the prompts) or `set` to `value`.
        value: Activation for `set`.
        options: Other text, continuations and random features to compare with.

    Returns:
        The behaviour before and after, overall and by case, beside the same edit of random features.

    Raises:
        UserError: For a name that is no feature, or a value that the operation does not take.
    """
    return _edit(Edit(features, operation, value), features, prompts, circuit, options)


def steer(
    features: FeatureNames | Sequence[str] | str,
    prompts: PromptSet | None = None,
    *,
    value: float,
    circuit: Circuit | None = None,
    operation: Literal["steer", "scale"] = "steer",
    options: EditOptions | None = None,
) -> EditReport:
    """Push the model along features, and measure what becomes of the behaviour.

    Args:
        features: As for `ablate`.
        prompts: As for `ablate`.
        value: What is added to the activation at every token, or for `scale` the factor it is multiplied by.
        circuit: As for `ablate`.
        operation: `steer` adds, `scale` multiplies where the feature is active.
        options: As for `ablate`.

    Returns:
        As `ablate`.

    Raises:
        UserError: As `ablate`.
    """
    return _edit(Edit(features, operation, value), features, prompts, circuit, options)


def _edit(
    edit: Edit,
    features: FeatureNames | Sequence[str] | str,
    prompts: PromptSet | None,
    circuit: Circuit | None,
    options: EditOptions | None,
) -> EditReport:
    if circuit is None and isinstance(features, FeatureNames):
        circuit = features.circuit
    if circuit is None:
        raise UserError("whose features are these? Give circuit=, or take circuit.strongest_features(n)")
    prompts = circuit.prompts if prompts is None else prompts
    return measure_edit(circuit.model, circuit.saes, edit, prompts, options, metric=circuit.metric)


# ------------------------------------------------------------------------------------------ the edit itself


class SiteFeatureEdit:
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
        edited = column[active.feature] >= 0
        f = torch.zeros(len(tokens), len(self.index), device=x.device)  # [N, n]
        f[active.token[edited], column[active.feature[edited]]] = active.value[edited].float()
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
) -> dict[Site, SiteEdit]:
    """Edits by site, for `LanguageModel.run` and `LanguageModel.generate`. means: [n] by site, for `mean`."""
    check_operation(operation, value)
    if operation == "mean" and means is None:
        raise UserError("the operation 'mean' needs the means of the features: see feature_means")
    constant = None if value is None else torch.tensor(float(value))
    targets = means if operation == "mean" and means is not None else dict.fromkeys(features, constant)
    return {site: SiteFeatureEdit(saes[site], index, operation, targets[site]) for site, index in features.items()}


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
    readers = {site: SiteFeatureEdit(saes[site], index, "zero") for site, index in features.items()}
    sums = {site: torch.zeros(len(index), device=as_saes(saes).device) for site, index in features.items()}
    n_tokens = 0
    masks: Sequence[Tensor | None] = where or [None] * len(batches)
    for tokens, mask in zip(batches, masks, strict=True):
        activations = counted_activations(model, tokens, features, mask)
        n_tokens += len(next(iter(activations.values())))
        for site, x in activations.items():
            sums[site] += readers[site].features(x).sum(0)
    return {site: total / max(n_tokens, 1) for site, total in sums.items()}


# ------------------------------------------------------------------------------------------ editing and measuring


def measure_edit(
    model: LanguageModel,
    saes: Mapping[Site, SparseAutoencoder],
    edit: Edit,
    prompts: PromptSet,
    options: EditOptions | None = None,
    *,
    metric: str | Metric | None = None,
) -> EditReport:
    """Edit features of any SAEs and report what that does; metric: the logit difference by default."""
    options = options or EditOptions()
    features = edit.by_span(saes)
    if options.texts and set(features) != {EVERYWHERE}:
        raise UserError(
            "other text has no spans of the prompts: leave it out, or edit the features at all tokens (--everywhere, "
            "in Python names without @)"
        )
    ensure_checked(model, saes, {site for of_span in features.values() for site in of_span})
    m = get_metric(metric or logit_difference)
    texts = list(token_batches(model, sorted(options.texts, key=len), max_tokens=None, batch_size=16))
    trial = _Trial(model, saes, prepare(prompts, model, m), texts, edit, m, options)
    draws = trial.draw_random_features(features)
    n_edited, n_drawn = _count(features), min(map(_count, draws), default=0)
    draws = draws if n_drawn else []
    edits = trial.edits(features)
    return EditReport(
        features=_names(features),
        operation=edit.operation,
        value=edit.value,
        metric=metric_title(m, trial.prompts),
        shares=has_shares(m),
        n_prompts=len(prompts),
        n_texts=len(options.texts),
        before=trial.behaviour(SpanEdits({})),
        after=trial.behaviour(edits),
        random=[trial.behaviour(trial.edits(draw)) for draw in draws],
        random_features=[_names(draw) for draw in draws],
        random_left=n_drawn if options.n_random and n_drawn < n_edited else None,
        continuations=continuations(model, trial.prompts, edits, n=options.generate, new_tokens=options.new_tokens),
        seed=options.seed,
    )


@dataclass(frozen=True)
class _Trial:
    """One way to edit features, whichever they are, and what is measured of the edited model."""

    model: LanguageModel
    saes: Mapping[Site, SparseAutoencoder]
    prompts: PromptSet
    texts: Sequence[Tokens]
    """Batches of other text."""
    edit: Edit
    metric: Metric
    options: EditOptions

    def draw_random_features(self, like: SpanFeatures) -> list[dict[str, dict[Site, Tensor]]]:
        """Draws of as many random active features as are edited, at the same spans."""
        if not self.options.n_random:
            return []
        generator = torch.Generator().manual_seed(self.options.seed)
        size = self.options.batch_size
        active = {
            span: active_features(self.model, self.saes, self.prompts, span=span, batch_size=size) for span in like
        }
        same_sites = self.options.same_sites
        return [
            {
                span: random_features(active[span], features, generator=generator, same_sites=same_sites)
                for span, features in like.items()
            }
            for _ in range(self.options.n_random)
        ]

    def edits(self, features: SpanFeatures) -> SpanEdits:
        """The edits of features at their spans."""
        return SpanEdits({span: self._edits_at(span, of_span) for span, of_span in features.items()})

    def _edits_at(self, span: str, features: Features) -> dict[Site, SiteEdit]:
        """`mean` is over the other text where there is any, else over the tokens of the span."""
        means = None
        if self.edit.operation == "mean":
            batches = list(self.prompts.batches(self.options.batch_size))
            where = None if self.texts else [tokens_at(batch, span) for batch in batches]
            text = self.texts or [batch.clean for batch in batches]
            means = feature_means(self.model, self.saes, features, text, where=where)
        return make_edits(self.saes, features, operation=self.edit.operation, value=self.edit.value, means=means)

    def behaviour(self, edits: SpanEdits) -> Behaviour:
        """The behaviour of the edited model, with the cross-entropy on the other text where there is any."""
        size = self.options.batch_size
        scores = measure(self.model, self.prompts, edits=edits, metric=self.metric, batch_size=size)
        ce = cross_entropy(self.model, self.texts, edits=edits(self.prompts[:1])) if self.texts else None
        return replace(scores, ce=ce)


def _count(features: SpanFeatures) -> int:
    return sum(len(index) for of_span in features.values() for index in of_span.values())


def _names(features: SpanFeatures) -> list[str]:
    return [f"{name}@{span}" if span else name for span, of_span in features.items() for name in feature_names(of_span)]
