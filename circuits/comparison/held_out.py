"""Which prompts are held out where no test set is given.

1. Prompts that share their texts are one unit: a pair and its mirror image (clean and patch swapped), or the same pair
   twice. A unit is never on both sides.
2. Within each stratum (the cases of a unit, and the template of its first prompt) units go to the two sides in turn, so
   that both have every case and template; the first goes to the side that has fewer, of equals to where circuits are
   found.
3. Strata of one unit are too thin to divide: they go in turn by case alone.
"""

from __future__ import annotations

from circuits.prompts.alignment import words_of
from circuits.prompts.dataset import PromptSet
from sae.errors import UserError


def hold_out_half(prompts: PromptSet) -> tuple[PromptSet, PromptSet]:
    """Prompts that circuits are found on, and prompts they are scored on, each in the order of the file."""
    units = _units(prompts)
    if len(units) < 2:
        raise UserError(
            f"{len(prompts)} usable prompts with {len(units)} different pairs cannot be divided into prompts that "
            "circuits are found on and prompts they are scored on: give more, or a --test file"
        )
    strata: dict[tuple[frozenset[str], str], list[list[int]]] = {}
    for rows in units:
        cases = frozenset(prompts.cases[row] for row in rows)
        strata.setdefault((cases, prompts.templates[rows[0]]), []).append(rows)
    thin: dict[frozenset[str], list[list[int]]] = {}
    for cases, template in [key for key, members in strata.items() if len(members) == 1]:
        thin.setdefault(cases, []).extend(strata.pop((cases, template)))
    held_out: list[int] = []
    n_divided = 0
    lone = [rows for members in thin.values() for rows in members]
    for members in [*strata.values(), lone]:
        first = 1 if 2 * len(held_out) >= n_divided else 0
        held_out += [row for rows in members[first::2] for row in rows]
        n_divided += sum(map(len, members))
    found_on = sorted(set(range(len(prompts))) - set(held_out))
    return prompts[found_on], prompts[sorted(held_out)]


def _units(prompts: PromptSet) -> list[list[int]]:
    """The rows of each unit, units in the order of their first row."""
    units: dict[frozenset[str], list[int]] = {}
    sides = [prompts.clean] if prompts.patch is None else [prompts.clean, prompts.patch]
    for row, texts in enumerate(zip(*([" ".join(words) for words in words_of(side)] for side in sides), strict=True)):
        units.setdefault(frozenset(texts), []).append(row)
    return list(units.values())
