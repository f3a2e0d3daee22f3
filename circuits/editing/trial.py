"""Edits of a model with what is measured of them: the behaviour before and after, its cost on other text, controls.

Shapes: B prompts, S positions.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from circuits.editing.applied import FeatureEdits, with_references
from circuits.editing.declaration import Edit
from circuits.editing.measures import continuations, measure
from circuits.editing.random_features import active_features, random_features
from circuits.editing.results import SEVERAL, Behaviour, Continuation, EditReport
from circuits.editing.targets import Features, feature_names
from circuits.metrics.metrics import Metric, has_shares, metric_title
from circuits.prompts.dataset import PromptSet
from sae.autoencoder import SparseAutoencoder
from sae.data.predictions import cross_entropy
from sae.model.language_model import LanguageModel, Tokens
from sae.model.sites import Site


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
        return self._at_work(self.resolved)

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

    def _resolved(self, edits: Sequence[Edit]) -> list[Edit]:
        return [
            with_references(
                self.model, self.saes, edit, prompts=self.prompts, texts=self.texts, seed=self.options.seed
            )
            for edit in edits
            if edit.names
        ]  # fmt: skip

    def _at_work(self, resolved: Sequence[Edit]) -> FeatureEdits:
        return FeatureEdits(self.model, self.saes, resolved, prompts=self.prompts, seed=self.options.seed)

    def _on_text(self, resolved: Sequence[Edit]) -> FeatureEdits:
        """The edits as they are on other text, which has no spans and no generated tokens: at all tokens."""
        if all(edit.is_everywhere for edit in resolved):
            return self._at_work(resolved)
        return self._at_work(self._resolved([edit.everywhere() for edit in resolved]))

    def behaviour(self, resolved: Sequence[Edit]) -> Behaviour:
        """The behaviour of the edited model, with the cross-entropy on the other text where there is any."""
        size = self.options.batch_size
        scores = measure(
            self.model, self.prompts, edits=self._at_work(resolved), metric=self.metric, batch_size=size
        )  # fmt: skip
        if not self.texts:
            return scores
        with self.model.edited(self._on_text(resolved).standing()):
            return replace(scores, ce=cross_entropy(self.model, self.texts))

    def report(self, continued: Sequence[Continuation] | None = None) -> EditReport:
        """Everything that is measured; `continued`: the continuations, where they are there already."""
        options, first = self.options, self.listed[0]
        names, n_drawn = self._names(self.listed), min((len(self._names(draw)) for draw in self.draws), default=0)
        draws = self.draws if n_drawn else []
        if continued is None:
            n, new_tokens = options.generate, options.new_tokens
            continued = continuations(self.model, self.prompts, self.edits, n=n, new_tokens=new_tokens)
        return EditReport(
            features=names,
            operation=first.operation if len(self.listed) == 1 else SEVERAL,
            value=first.value if len(self.listed) == 1 else None,
            metric=metric_title(self.metric, self.prompts),
            shares=has_shares(self.metric),
            n_prompts=len(self.prompts),
            n_texts=len(options.texts),
            before=self.behaviour([]),
            after=self.behaviour(self.resolved),
            random=[self.behaviour(self._resolved(draw)) for draw in draws],
            random_features=[self._names(draw) for draw in draws],
            random_left=n_drawn if options.n_random and n_drawn < len(names) else None,
            continuations=list(continued),
            seed=options.seed,
            edits=[edit.to_dict() for edit in self.resolved],
        )


def _joined(several: Iterable[Features]) -> dict[Site, Tensor]:
    """All features of several choices, by site."""
    chosen: dict[Site, list[Tensor]] = {}
    for features in several:
        for site, index in features.items():
            chosen.setdefault(site, []).append(index)
    return {site: torch.cat(indices).unique() for site, indices in chosen.items()}
