"""Finite-state automata of features: features that make one another come next, as states do.

Bricken et al. 2023, "Towards Monosemanticity", section Finite State Automata: a feature raises the probability of
tokens on which another is on, and that again of a third; they saw it in the features' weights on the logits. Here

1. the transitions are those of `sae.features.transitions`: feature A at a token raises B at the next by T[A, B] in the
   text, above chance, and by M[A, B] through the model's own predictions;
2. those of which the model has no part are left out;
3. transitions are taken from the largest M down. Each joins its two features, and what hangs with them, to one
   automaton, unless that would have more than `MOST_STATES`, and a state has `MOST_WAYS` ways on at most.

An automaton with a way back is a *cycle*, a single feature that makes itself go on a *loop*, any other a *chain*.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sae._files import without_nan
from sae._frames import Result, frame_text
from sae.autoencoder import SparseAutoencoder
from sae.data.text import TextSource
from sae.features.groups import MOST_TOKENS
from sae.features.reading import Reading, read_features
from sae.features.transitions import Transition, most, transitions_of
from sae.model.language_model import LanguageModel
from sae.model.sites import Site

if TYPE_CHECKING:
    import pandas as pd

MOST_STATES, MOST_WAYS = 8, 3


@dataclass(frozen=True)
class State:
    """A feature that is a state of an automaton."""

    feature: int
    """The feature."""
    fires: int
    """Tokens on which it fires."""
    token_ids: list[int]
    """Tokens that have most of its activation, the first one most."""


@dataclass(frozen=True)
class Automaton:
    """Features of one site that make one another come next."""

    site: str
    """Site."""
    states: list[State]
    """Its features, in the order of the ways between them where there is one."""
    transitions: list[Transition]
    """Ways between them, largest M first."""

    @property
    def kind(self) -> str:
        """Whether there is a way back: cycle, loop or chain."""
        import networkx as nx

        if len(self.states) == 1:
            return "loop"
        ways = nx.DiGraph((way.source, way.target) for way in self.transitions if way.source != way.target)
        return "chain" if nx.is_directed_acyclic_graph(ways) else "cycle"

    @property
    def strength(self) -> float:
        """The sum of M over its transitions."""
        return sum(way.effect for way in self.transitions)


@dataclass(frozen=True)
class Automata(Result):
    """The automata of some sites, strongest first."""

    automata: list[Automaton]
    """The automata."""
    n_tokens: int
    """Tokens of the text that count."""
    of_text: dict[str, int]
    """By site, transitions that are in the text."""
    of_model: dict[str, int]
    """By site, those of them that go through the model's predictions."""
    strings: dict[int, str] = field(default_factory=dict)
    """The text of the tokens that are named."""

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON values."""
        data = asdict(self)
        for automaton, entry in zip(self.automata, data["automata"], strict=True):
            entry |= {"kind": automaton.kind, "strength": automaton.strength}
        data["strings"] = {str(token): string for token, string in self.strings.items()}
        return {"schema_version": 1, **without_nan(data)}

    def to_frame(self) -> pd.DataFrame:
        """A row a transition: its automaton's number, from 1 on, T and M with their errors, and what carries it."""
        import pandas as pd

        rows = [
            {
                "automaton": number, "kind": automaton.kind, "site": automaton.site, "source": way.source,
                "target": way.target, "n": way.count, "raised": way.raised, "raised_error": way.raised_error,
                "effect": way.effect, "effect_error": way.effect_error, "tokens": self.words(way.token_ids),
            }
            for number, automaton in enumerate(self.automata, start=1)
            for way in automaton.transitions
        ]  # fmt: skip
        columns = ["automaton", "kind", "site", "source", "target", "n", "raised", "raised_error", "effect",
                   "effect_error", "tokens"]  # fmt: skip
        return pd.DataFrame(rows, columns=columns)

    def words(self, token_ids: Iterable[int]) -> str:
        """Some tokens as text."""
        return " ".join(self.strings.get(token, f"#{token}").strip() or "␣" for token in token_ids)

    def text(self) -> str:
        """The transitions of the first automata as a table, and how many there are."""
        n = Counter(automaton.kind for automaton in self.automata)
        kinds = ", ".join(f"{n[kind]} {kind}{'s' * (n[kind] != 1)}" for kind in ("cycle", "chain", "loop"))
        head = f"automata of features on {self.n_tokens:,} tokens: {kinds}; of "
        head += f"{sum(self.of_text.values()):,} transitions in the text {sum(self.of_model.values()):,} go through "
        head += "the model's predictions"
        return f"{head}\n{frame_text(self.to_frame().head(16))}" if self.automata else head


def find_automata(
    model: LanguageModel,
    saes: Mapping[Site, SparseAutoencoder],
    texts: str | Path | TextSource | Iterable[str],
    *,
    sites: Sequence[Site] | None = None,
    max_tokens: int = MOST_TOKENS,
    batch_size: int = 16,
    context: int | None = None,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> Automata:
    """Find features that make one another come next, as states of an automaton do.

    Args:
        model: the model.
        saes: its autoencoders by site.
        texts: the text that is read.
        sites: sites that are looked at, each by itself; all of `saes` by default.
        max_tokens, batch_size, context: as in `evaluate_saes`.
        seed: of the shuffles and of the contexts that features are taken away in.
        progress: called after each batch with its number of tokens.

    Returns:
        The automata of all sites, strongest first.

    Raises:
        UserError: the text is empty.
    """
    chosen = list(saes if sites is None else sites)
    reading = read_features(
        model, saes, texts, chosen, max_tokens=max_tokens, batch_size=batch_size, context=context, progress=progress
    )
    automata, of_text, of_model = list[Automaton](), dict[str, int](), dict[str, int]()
    for site in chosen:
        ways = transitions_of(model, site, saes[site], reading, seed=seed)
        through = [way for way in ways if way.is_of_model]
        of_text[site.name], of_model[site.name] = len(ways), len(through)
        automata += [_automaton(site, reading, part) for part in joined(through)]
    automata.sort(key=lambda automaton: -automaton.strength)
    named = [part.token_ids for one in automata for part in one.states]
    named += [part.token_ids for one in automata for part in one.transitions]
    shown = {token for ids in named for token in ids}
    strings = dict(zip(sorted(shown), model.token_strings(sorted(shown)), strict=True))
    return Automata(automata, reading.n_tokens, of_text, of_model, strings)


def joined(transitions: Iterable[Transition]) -> list[list[Transition]]:
    """Transitions by automaton, largest M first, those left out that would make one too large or too dense."""
    automaton_of: dict[int, set[int]] = {}
    taken, ways = list[Transition](), Counter[int]()
    for way in sorted(transitions, key=lambda way: (-way.effect, way.source, way.target)):
        states = automaton_of.get(way.source, {way.source}) | automaton_of.get(way.target, {way.target})
        if len(states) <= MOST_STATES and ways[way.source] < MOST_WAYS:
            taken.append(way)
            ways[way.source] += 1
            automaton_of.update(dict.fromkeys(states, states))
    by_number: dict[int, list[Transition]] = {}
    for way in taken:
        by_number.setdefault(id(automaton_of[way.source]), []).append(way)
    return list(by_number.values())


def _automaton(site: Site, reading: Reading, transitions: list[Transition]) -> Automaton:
    """The automaton of some transitions, its states in the order in which a walk from the first one meets them."""
    import networkx as nx

    graph = nx.DiGraph((way.source, way.target) for way in transitions)
    starts = sorted(graph, key=lambda state: graph.in_degree(state))  # stable: that of the largest M before others
    order = dict.fromkeys(state for start in starts for state in nx.dfs_preorder_nodes(graph, start))
    f = reading.features[site]
    states = []
    for feature in order:
        mine = f.feature == feature
        tokens, which = reading.token_ids[f.token[mine]].unique(return_inverse=True)
        sums = torch.zeros(len(tokens)).index_add_(0, which, f.value[mine]).numpy()
        states.append(State(int(feature), int(mine.sum()), tokens[most(sums)].tolist()))
    return Automaton(site.name, states, transitions)
