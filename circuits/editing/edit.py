"""Changing what a model does through its features, and measuring what that did.

1. Choose features by name (`resid_3/120`, at a span of the prompts alone `resid_3/120@subject`, at the tokens
   generated after them `resid_3/120@generated`); `Circuit.strongest_features(n)` names the strongest of a circuit.
2. At each of their sites the activation x becomes x' = x + sum_i (f_i' - f_i) W_dec[i]. All other features and the
   error of the autoencoder stay as they are, so the edit does exactly what it says and nothing else:

   | operation | f_i' |
   |---|---|
   | `zero` | 0 |
   | `mean` | mean of f_i over reference text, or over the prompts, there by template and position |
   | `resample` | f_i at a random token of the reference |
   | `set` | value |
   | `clamp` | value where f_i is larger |
   | `scale` | value * f_i |
   | `steer` | f_i + value, whether the feature is active or not |

   `Edit.strength` multiplies the change: `mean` at 2 mirrors f_i about its mean (`circuits.editing.flipping`).
   f_i is read from the activation the edited model has at that point, at every position, in generation too, unless the
   edit says otherwise: `Edit` has all that can be said of where, when and how strongly. `edited` lets edits stand while
   the caller does as he likes with the model.
3. Measure the behaviour before and after, overall and by case, the cross-entropy on other text, and sample
   continuations (`circuits.editing.measures`); beside it the same edit of equally many random features that are active
   on the prompts (several draws), without which no drop of the metric means anything.

Shapes: B prompts, S positions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal

from circuits.circuit import Circuit, FeatureNames
from circuits.editing.declaration import Edit
from circuits.editing.random_features import draws_of_equal_effect
from circuits.editing.results import EditReport
from circuits.editing.targets import GENERATED
from circuits.editing.trial import EditOptions, Trial
from circuits.metrics.metrics import Metric, get_metric, logit_difference, prepare
from circuits.prompts.dataset import PromptSet
from sae.autoencoder import SparseAutoencoder
from sae.data.batches import token_batches
from sae.errors import UserError
from sae.model.language_model import LanguageModel
from sae.model.sites import Site
from sae.splice import ensure_checked

# ------------------------------------------------------------------------------------------ the front door


def ablate(
    features: FeatureNames | Sequence[str] | str,
    prompts: PromptSet | None = None,
    *,
    circuit: Circuit | None = None,
    operation: Literal["mean", "zero", "resample", "set", "clamp"] = "mean",
    value: float | None = None,
    options: EditOptions | None = None,
) -> EditReport:
    """Take features out of the model, or fix their value, and measure what becomes of the behaviour.

    Args:
        features: `circuit.strongest_features(n)`, or names (see `Edit.features`) of features of `circuit`.
        prompts: What to measure on, best held out; the prompts the circuit was found on by default.
        circuit: The circuit, whose model, SAEs and metric are used; where `features` do not know it.
        operation: `mean` (over `options.texts`, else over the prompts, by template and position or at the span),
            `zero`, `resample`, `set` to `value`, or `clamp` to at most `value`.
        value: Activation for `set` and `clamp`.
        options: Other text, continuations and random features to compare with.

    Returns:
        The behaviour before and after, overall and by case, beside the same edit of random features; of a supernode
        (`circuit.supernode(name)`) also beside that of other features of the circuit, as many and of the same effect.

    Raises:
        UserError: For a name that is no feature, or a value that the operation does not take.
    """
    by_template = operation == "mean" and not (options and options.texts)
    return _edit(Edit(features, operation, value, by_template=by_template), features, prompts, circuit, options)


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
    if isinstance(features, FeatureNames) and features.is_group:
        options = options or EditOptions()
        draws = draws_of_equal_effect(
            circuit.feature_effects, features, n_draws=options.n_random, seed=options.seed
        )  # fmt: skip
        options = replace(options, equal_effect=draws)
    return measure_edit(circuit.model, circuit.saes, edit, prompts, options, metric=circuit.metric)


# ------------------------------------------------------------------------------------------ editing and measuring


def measure_edit(
    model: LanguageModel,
    saes: Mapping[Site, SparseAutoencoder],
    edit: Edit | Sequence[Edit],
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
    edit: Edit | Sequence[Edit],
    prompts: PromptSet,
    options: EditOptions | None = None,
    *,
    metric: str | Metric | None = None,
) -> Trial:
    """Check edits against SAEs and prompts, and make everything ready to measure them; see `measure_edit`."""
    options = options or EditOptions()
    edits = [edit] if isinstance(edit, Edit) else list(edit)
    by_span = [of_edit for edit in edits for of_edit in edit.by_span(saes).items()]
    if GENERATED in prompts.spans and any(span == GENERATED for span, _ in by_span):
        raise UserError(
            f"@{GENERATED} stands for generated tokens, and these prompts have a span of that name: rename it"
        )
    ensure_checked(model, saes, {site for _, of_span in by_span for site in of_span})
    m = get_metric(metric or logit_difference)
    texts = list(token_batches(model, sorted(options.texts, key=len), max_tokens=None, batch_size=16))
    return Trial(model, saes, prepare(prompts, model, m), texts, edits, m, options)
