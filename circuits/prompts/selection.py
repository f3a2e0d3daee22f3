"""Which examples of a file are used where a number is asked for: the first ones, unless these miss a kind of example.

1. The kind of an example is its case and its sentence frame: the `template` field where every example has one, else the
   words that clean and patch prompt share ("* was sad because"), where such frames hold at least four examples on
   average and two of each kind can be taken, else none.
2. The first n usable examples are taken. Where a kind of the file is not among them, examples are taken by kind
   instead: each in proportion to its share of the file and at least once, in the order of the file within a kind.
3. Examples are examined (tokenised) in batches until n are usable, so that a long file costs little.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from typing import TypeVar

from circuits.prompts.formats import Example

MIN_EXAMPLES_A_FRAME = 4
"""Average number of examples below which frames of shared words say nothing."""
_BATCH = 64
Usable = TypeVar("Usable")


def choose(
    examples: Sequence[Example], examine: Callable[[list[int]], list[Usable | str]], limit: int | None
) -> tuple[list[Usable], Counter[str]]:
    """At most `limit` usable examples in the order of the file, and how many of those looked at are not, by reason.

    examine: for the examples of some rows what is used of them, or why they cannot be.
    """
    everything = list(range(len(examples)))
    results: dict[int, Usable | str] = {}
    if limit is None or limit >= len(examples):
        results = dict(zip(everything, examine(everything), strict=True))
        chosen = everything
    else:
        kinds = kinds_of(examples, limit)
        chosen = _take(everything, results, examine, limit)
        if {kinds[row] for row in chosen if not isinstance(results[row], str)} < set(kinds):
            chosen = sorted(_take(by_kind(kinds), results, examine, limit))
    usable = [results[row] for row in chosen if not isinstance(results[row], str)]
    return usable, Counter(str(results[row]) for row in chosen if isinstance(results[row], str))  # type: ignore[return-value]


def _take(
    order: Sequence[int], results: dict[int, Usable | str], examine: Callable[[list[int]], list[Usable | str]], n: int
) -> list[int]:
    """The rows in this order up to the n-th usable one; what is found of rows is added to `results`."""
    taken: list[int] = []
    n_usable = 0
    for start in range(0, len(order), max(n, _BATCH)):
        batch = order[start : start + max(n, _BATCH)]
        unknown = [row for row in batch if row not in results]
        results.update(zip(unknown, examine(unknown), strict=True))
        for row in batch:
            taken.append(row)
            n_usable += not isinstance(results[row], str)
            if n_usable == n:
                return taken
    return taken


def kinds_of(examples: Sequence[Example], limit: int) -> list[tuple[str, str]]:
    """Case and sentence frame of each example."""
    cases = [example.case for example in examples]
    templates = [example.template for example in examples]
    if all(templates):
        return list(zip(cases, templates, strict=True))
    templates = [_shared_words(example) for example in examples]
    kinds = list(zip(cases, templates, strict=True))
    telling = len(templates) >= MIN_EXAMPLES_A_FRAME * len(set(templates)) and 2 * len(set(kinds)) <= limit
    return kinds if telling else [(case, "") for case in cases]


def first_rows(kinds: Sequence[Hashable], n: int) -> list[int]:
    """The first n rows, or where these miss a kind, n rows by kind in their order."""
    has_all_kinds = set(kinds[:n]) == set(kinds)
    return list(range(len(kinds)))[:n] if has_all_kinds else sorted(by_kind(kinds)[:n])


def by_kind(kinds: Sequence[Hashable]) -> list[int]:
    """All rows, so that any first n of them hold each kind by its share, and at least once where n allows."""
    size = Counter(kinds)
    seen: Counter[Hashable] = Counter()
    rank = []
    for row, kind in enumerate(kinds):
        rank.append((seen[kind] / size[kind], row))
        seen[kind] += 1
    return [row for _, row in sorted(rank)]


def _shared_words(example: Example) -> str:
    clean, patch = example.clean.split(), (example.patch or "").split()
    if len(clean) != len(patch):
        return ""
    return " ".join(a if a == b else "*" for a, b in zip(clean, patch, strict=True))
