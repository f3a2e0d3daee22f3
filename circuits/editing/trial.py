"""Edits of a model with what is measured of them: the behaviour before and after, its cost on other text, controls.

Shapes: B prompts, S positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from circuits.editing.applied import FeatureEdits, frozen, placed, with_references
from circuits.editing.controls import change_norm, random_directions
from circuits.editing.declaration import Edit
from circuits.editing.measures import (
    answers_of,
    bias,
    continuations,
    continued_ids,
    fluency,
    in_turn,
    left_intervals,
    prompt_values,
    scored,
)
from circuits.editing.random_features import EffectDraw, active_features, random_features
from circuits.editing.records import Behaviour, Choice, Continuation, Dose, Fluency
from circuits.editing.results import SEVERAL, EditReport
from circuits.editing.targets import EVERYWHERE, Features, feature_names
from circuits.editing.template_means import MeansByPlace
from circuits.editing.text_cost import OtherText
from circuits.metrics.metrics import Edits, Metric, has_shares, logit_difference, metric_title
from circuits.metrics.probe import Probe
from circuits.prompts.dataset import PromptSet
from sae.autoencoder import SparseAutoencoder
from sae.model.hook_points import SiteEdit, StandingEdit
from sae.model.language_model import LanguageModel, Tokens
from sae.model.sites import Site

Standing = Mapping[Site, StandingEdit]


@dataclass(frozen=True)
class EditOptions:
    """Options of a trial: what is measured of an edited model, and with what it is compared."""

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
    scales: Sequence[float] = ()
    """Strengths at which the edit is measured as well: its changes times these."""
    answers: Sequence[int] = ()
    """Further tokens that answer the behaviour, beside those of the prompts: their cost on text is told apart."""
    equal_effect: Sequence[EffectDraw] = ()
    """Other features of the circuit, as many and of the same summed |effect|, each draw given the same edit; of a
    single edit alone.
    """
    resamples: int = 1000
    """Times the prompts are drawn anew for intervals; 0 for none."""


@dataclass(frozen=True)
class Trial:
    """Edits, whichever they are, and what is measured of the edited model."""

    model: LanguageModel
    saes: Mapping[Site, SparseAutoencoder]
    prompts: PromptSet
    texts: Sequence[Tokens]
    """Batches of other text."""
    listed: Sequence[Edit]
    """The edits as they were given."""
    metric: Metric
    options: EditOptions

    @cached_property
    def resolved(self) -> list[Edit]:
        """The edits with what they refer to."""
        return self._resolved(self.listed)

    @cached_property
    def edits(self) -> FeatureEdits:
        """The edits at work."""
        return self._applied(self.resolved)

    @cached_property
    def draws(self) -> list[list[Edit]]:
        """The same edits of as many random active features, at the same spans; fewer where there are not as many."""
        if not self.options.n_random:
            return []
        generator = torch.Generator().manual_seed(self.options.seed)
        by_edit = [edit.by_span(self.saes) for edit in self.listed]
        edited = _joined(features for spans in by_edit for features in spans.values())
        active = {
            span: active_features(
                self.model, self.saes, self.prompts, span=span, batch_size=self.options.batch_size
            )
            for span in dict.fromkeys(span for spans in by_edit for span in spans)
        }  # fmt: skip
        return [
            [
                replace(edit, features=self._drawn(spans, active, edited, generator), reference={})
                for edit, spans in zip(self.listed, by_edit, strict=True)
            ]
            for _ in range(self.options.n_random)
        ]

    def edits_of(self, edits: Sequence[Edit]) -> FeatureEdits:
        """Other edits at work, such as those of a draw."""
        return self._applied(self._resolved(edits))

    def _drawn(
        self,
        like: Mapping[str, Features],
        active: Mapping[str, Features],
        edited: Features,
        generator: torch.Generator,
    ) -> list[str]:
        """Names of random features, as many as in `like` and none that is edited."""
        names = []
        for span, features in like.items():
            free = {site: index[~torch.isin(index, edited[site])] if site in edited else index
                    for site, index in active[span].items()}  # fmt: skip
            drawn = random_features(free, features, generator=generator, same_sites=self.options.same_sites)
            names += [f"{name}@{span}" if span else name for name in feature_names(drawn)]
        return names

    def _names(self, edits: Sequence[Edit]) -> list[str]:
        return [name for edit in edits if edit.names for name in edit.listed(self.saes)]

    @cached_property
    def means(self) -> MeansByPlace:
        """Means by template, which the edits and those of all draws share."""
        return MeansByPlace(self.model, self.saes, self.prompts)

    @cached_property
    def _measured(self) -> dict[str, dict[str, float | Sequence[float]]]:
        """Numbers that edits refer to, as far as they were measured: by kind and name of the feature."""
        return {}

    def _measure(self, draws: Iterable[Sequence[Edit]]) -> None:
        """Measure what the edits of all draws refer to, in the same passes."""
        for edits in zip(*draws, strict=True):
            names = list(dict.fromkeys(name for edit in edits for name in edit.names))
            together = replace(edits[0], features=names, reference={})
            on_text = [together.everywhere()] if self.is_spread and self.texts else []
            for edit in self._resolved([together, *on_text]):
                if edit.by_template:
                    self.means.measure(edit.by_span(self.saes).get(EVERYWHERE, {}))

    def _resolved(self, edits: Sequence[Edit]) -> list[Edit]:
        """The edits with what they refer to, nothing of which is measured twice."""
        resolved = []
        for edit in (edit for edit in edits if edit.names):
            measured = self._measured.setdefault(edit.refers or "", {})
            before = {name: measured[name] for name in edit.listed(self.saes) if name in measured}
            complete = with_references(
                self.model, self.saes, replace(edit, reference={**before, **edit.reference}), prompts=self.prompts,
                texts=self.texts, seed=self.options.seed,
            )  # fmt: skip
            measured |= {name: number for name, number in complete.reference.items() if name not in edit.reference}
            resolved.append(complete)
        return resolved

    def _applied(self, resolved: Sequence[Edit], strength: float = 1.0) -> FeatureEdits:
        return FeatureEdits(
            self.model, self.saes, resolved, prompts=self.prompts, means=self.means, strength=strength,
            seed=self.options.seed,
        )  # fmt: skip

    @cached_property
    def other_text(self) -> OtherText | None:
        """The other text with the untouched model's predictions; None where there is none."""
        return OtherText(self.model, self.texts, self._answers()) if self.texts else None

    def _answers(self) -> list[int]:
        """Tokens that answer the behaviour; none for probes, whose prompts have answers for form's sake alone."""
        if isinstance(self.metric, Probe):
            return []
        return [*answers_of(self.prompts), *self.options.answers]

    def _values(self, edits: Edits | None) -> tuple[Tensor, Tensor | None]:
        """The metric of every prompt, [B], and whether it is answered rightly, [B]."""
        return prompt_values(
            self.model, self.prompts, edits=edits, metric=self.metric, batch_size=self.options.batch_size
        )  # fmt: skip

    def behaviour(self, resolved: Sequence[Edit], strength: float = 1.0) -> Behaviour:
        """The behaviour of the edited model, with the cost on the other text where there is any."""
        edits = self._applied(resolved, strength)
        measured = scored(self.prompts, *self._values(edits))
        return self._with_cost(measured, lambda: self._on_text(resolved, strength).standing())

    def _with_cost(self, measured: Behaviour, on_text: Callable[[], Standing]) -> Behaviour:
        return measured if self.other_text is None else self.other_text.measured(measured, on_text())

    def _on_text(self, resolved: Sequence[Edit], strength: float = 1.0) -> FeatureEdits:
        """The edits as they are on other text, which has no spans and no generated tokens: at all tokens."""
        if not self.is_spread:
            return self._applied(resolved, strength)
        return self._applied(self._resolved([edit.everywhere() for edit in resolved]), strength)

    @property
    def is_spread(self) -> bool:
        """Whether the edits are at all tokens of other text, though not of the prompts."""
        return not all(edit.is_everywhere for edit in self.listed)

    def _controls(self, draws: Sequence[Sequence[Edit]]) -> dict[str, list[Behaviour]]:
        """The same edit of random features, that at equal norm, and random directions."""
        if not draws:
            return {}
        batches = list(self.prompts.batches(self.options.batch_size))
        norm = change_norm(self.model, batches, self.edits.standing)
        on_text = self._on_text(self.resolved).standing() if self.texts else {}
        generator = torch.Generator().manual_seed(self.options.seed)
        controls: dict[str, list[Behaviour]] = {"random": [], "random_equal_norm": [], "random_directions": []}
        for draw in map(self._resolved, draws):
            controls["random"].append(self.behaviour(draw))
            drawn_norm = change_norm(self.model, batches, self._applied(draw).standing)
            if drawn_norm > 0:
                controls["random_equal_norm"].append(self.behaviour(draw, norm / drawn_norm))
            seed = int(torch.randint(2**31, (), generator=generator))
            controls["random_directions"].append(self._along_directions(seed, on_text))
        return controls

    def _of_equal_effect(self) -> list[list[Edit]]:
        """The (only) edit with other features of the circuit, of which the options have draws."""
        return [[replace(self.listed[0], features=draw.features, reference={})] for draw in self.options.equal_effect]

    def _along_directions(self, seed: int, on_text: Standing) -> Behaviour:
        """The behaviour with random directions in place of the edit."""
        widths = self.model.widths

        def directions(prompts: PromptSet) -> dict[Site, SiteEdit]:
            return placed(random_directions(self.edits.standing(prompts), widths, seed), prompts)

        measured = scored(self.prompts, *self._values(directions))
        return self._with_cost(measured, lambda: random_directions(on_text, widths, seed))

    def report(
        self,
        continued: Sequence[Continuation] | None = None,
        *,
        choice: Choice | None = None,
        strongest: Sequence[Edit] = (),
    ) -> EditReport:
        """Everything that is measured.

        continued: the continuations, where they are there already; choice: how features were chosen; strongest: an
        edit to compare a choice with.
        """
        with frozen(self.model, self.listed):
            return self._report(continued, choice, strongest)

    def _report(
        self, continued: Sequence[Continuation] | None, choice: Choice | None, strongest: Sequence[Edit]
    ) -> EditReport:
        options, only = self.options, self.listed[0] if len(self.listed) == 1 else None
        names, n_drawn = self._names(self.listed), min((len(self._names(draw)) for draw in self.draws), default=0)
        draws = self.draws if n_drawn else []
        self._measure([*draws, *self._of_equal_effect()])
        if continued is None:
            n, new_tokens = options.generate, options.new_tokens
            continued = continuations(self.model, self.prompts, self.edits, n=n, new_tokens=new_tokens)
        values = [self._values(edits) for edits in (None, self.edits)]
        before = self._with_cost(scored(self.prompts, *values[0]), dict)
        after = self._with_cost(scored(self.prompts, *values[1]), lambda: self._on_text(self.resolved).standing())
        shares = has_shares(self.metric)
        return EditReport(
            features=names,
            operation=only.operation if only else SEVERAL,
            value=only.value if only else None,
            metric=metric_title(self.metric, self.prompts),
            shares=shares,
            n_prompts=len(self.prompts),
            n_texts=len(options.texts),
            before=before,
            after=after,
            **self._controls(draws) or {"random": []},
            random_equal_effect=[self.behaviour(self._resolved(draw)) for draw in self._of_equal_effect()],
            equal_effect_shares=[draw.share for draw in options.equal_effect],
            random_features=[self._names(draw) for draw in draws],
            random_left=n_drawn if options.n_random and n_drawn < len(names) else None,
            continuations=list(continued),
            seed=options.seed,
            edits=[edit.to_dict() for edit in self.resolved],
            intervals=left_intervals(self.prompts, values[0][0], values[1][0], resamples=options.resamples)
            if shares
            else None,
            bias=bias(self.prompts, before, after) if self.metric is logit_difference else None,
            doses=[Dose(scale, self.behaviour(self.resolved, scale)) for scale in options.scales],
            fluency=self._fluency() if continued else [],
            choice=choice,
            strongest=self.behaviour(self._resolved(strongest)) if strongest else None,
            spread_on_text=bool(self.texts) and self.is_spread,
            answer_share=self.other_text.answer_share if self.other_text else None,
        )

    def _fluency(self) -> list[Fluency]:
        """How good the continuations are as text, before and after."""
        chosen, new_tokens = in_turn(self.prompts, max(self.options.generate, 1)), self.options.new_tokens
        ids = (continued_ids(self.model, chosen, edits, new_tokens=new_tokens) for edits in (None, self.edits))
        return [fluency(self.model, chosen, of_run) for of_run in ids]


def _joined(several: Iterable[Features]) -> dict[Site, Tensor]:
    """All features of several choices, by site."""
    chosen: dict[Site, list[Tensor]] = {}
    for features in several:
        for site, index in features.items():
            chosen.setdefault(site, []).append(index)
    return {site: torch.cat(indices).unique() for site, indices in chosen.items()}
