"""Changing what a model does through its features, and measuring what that did.

1. Choose features by name (`resid_3/120`, at a span of the prompts alone `resid_3/120@subject`, at the tokens
   generated after them `resid_3/120@generated`); `Circuit.strongest_features(n)` names the strongest of a circuit.
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

Shapes: B prompts, S positions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from circuits.circuit import Circuit, FeatureNames
from circuits.editing.measures import continuations, measure
from circuits.editing.random_features import active_features, random_features
from circuits.editing.results import Behaviour, Continuation, EditReport
from circuits.editing.site_edit import check_operation, feature_means, make_edits
from circuits.editing.targets import (
    EVERYWHERE,
    GENERATED,
    Features,
    SpanEdits,
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
from sae.errors import UserError
from sae.model.hook_points import SiteEdit
from sae.model.language_model import LanguageModel, Tokens
from sae.model.sites import Site
from sae.splice import ensure_checked

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
    `resid_3/120@5` at a position, `resid_3/120@generated` at the tokens generated after the prompts.
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
    return prepare_trial(model, saes, edit, prompts, options, metric=metric).report()


def prepare_trial(
    model: LanguageModel,
    saes: Mapping[Site, SparseAutoencoder],
    edit: Edit,
    prompts: PromptSet,
    options: EditOptions | None = None,
    *,
    metric: str | Metric | None = None,
) -> Trial:
    """Check an edit against SAEs and prompts, and make everything ready to measure it; see `measure_edit`."""
    options = options or EditOptions()
    features = edit.by_span(saes)
    if options.texts and set(features) != {EVERYWHERE}:
        raise UserError(
            "other text has no spans of the prompts: leave it out, or edit the features at all tokens (--everywhere, "
            "in Python names without @)"
        )
    if GENERATED in features and GENERATED in prompts.spans:
        raise UserError(
            f"@{GENERATED} stands for generated tokens, and these prompts have a span of that name: rename it"
        )
    ensure_checked(model, saes, {site for of_span in features.values() for site in of_span})
    m = get_metric(metric or logit_difference)
    texts = list(token_batches(model, sorted(options.texts, key=len), max_tokens=None, batch_size=16))
    return Trial(model, saes, prepare(prompts, model, m), texts, edit, m, options)


@dataclass(frozen=True)
class Trial:
    """One way to edit features, whichever they are, and what is measured of the edited model."""

    model: LanguageModel
    saes: Mapping[Site, SparseAutoencoder]
    prompts: PromptSet
    texts: Sequence[Tokens]
    """Batches of other text."""
    edit: Edit
    metric: Metric
    options: EditOptions

    @cached_property
    def features(self) -> SpanFeatures:
        """The edited features."""
        return self.edit.by_span(self.saes)

    @cached_property
    def edits(self) -> SpanEdits:
        """The edits of these features."""
        return self.edits_of(self.features)

    @cached_property
    def draws(self) -> list[dict[str, dict[Site, Tensor]]]:
        """Draws of as many random active features, at the same spans; fewer where there are not as many."""
        if not self.options.n_random:
            return []
        generator = torch.Generator().manual_seed(self.options.seed)
        size, same_sites = self.options.batch_size, self.options.same_sites
        active = {
            span: active_features(self.model, self.saes, self.prompts, span=span, batch_size=size)
            for span in self.features
        }
        return [
            {
                span: random_features(active[span], features, generator=generator, same_sites=same_sites)
                for span, features in self.features.items()
            }
            for _ in range(self.options.n_random)
        ]

    def edits_of(self, features: SpanFeatures) -> SpanEdits:
        """The same edit of other features."""
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

    def report(self, continued: Sequence[Continuation] | None = None) -> EditReport:
        """Everything that is measured; `continued`: the continuations, where they are there already."""
        options = self.options
        n_edited, n_drawn = _count(self.features), min(map(_count, self.draws), default=0)
        draws = self.draws if n_drawn else []
        if continued is None:
            n, new_tokens = options.generate, options.new_tokens
            continued = continuations(self.model, self.prompts, self.edits, n=n, new_tokens=new_tokens)
        return EditReport(
            features=_names(self.features),
            operation=self.edit.operation,
            value=self.edit.value,
            metric=metric_title(self.metric, self.prompts),
            shares=has_shares(self.metric),
            n_prompts=len(self.prompts),
            n_texts=len(options.texts),
            before=self.behaviour(SpanEdits({})),
            after=self.behaviour(self.edits),
            random=[self.behaviour(self.edits_of(draw)) for draw in draws],
            random_features=[_names(draw) for draw in draws],
            random_left=n_drawn if options.n_random and n_drawn < n_edited else None,
            continuations=list(continued),
            seed=options.seed,
        )


def _count(features: SpanFeatures) -> int:
    return sum(len(index) for of_span in features.values() for index in of_span.values())


def _names(features: SpanFeatures) -> list[str]:
    return [f"{name}@{span}" if span else name for span, of_span in features.items() for name in feature_names(of_span)]
