"""Half of the prompts is held out: of each case and template, and never the mirror image of one that is not."""

from __future__ import annotations

from collections import Counter

import pytest

from circuits.comparison.held_out import hold_out_half
from circuits.prompts.dataset import PromptSet, make_prompts
from circuits.prompts.formats import Example
from sae.errors import UserError

PAIRS = [("man", "men"), ("boy", "boys"), ("dog", "dogs"), ("cat", "cats"), ("king", "kings"), ("girl", "girls")]


def example(clean: str, patch: str, case: str, template: str = "the {} runs") -> Example:
    answers = (" sees",), (" see",)
    return Example(
        template.format(clean), answers[0], template.format(patch), answers[1], case, template.replace("{}", "x")
    )


def texts(prompts: PromptSet) -> set[str]:
    return set(prompts.texts)


def test_mirror_images_stand_on_one_side(tiny_model) -> None:
    """Each pair followed by its mirror image, as generators write them: row by row the cases would divide."""
    examples = [x for a, b in PAIRS for x in (example(a, b, "one"), example(b, a, "many"))]
    found_on, held_out = hold_out_half(make_prompts(examples, tiny_model))
    assert Counter(found_on.cases) == Counter(held_out.cases) == {"one": 3, "many": 3}
    sides = {"the man runs", "the men runs"} & texts(found_on), {"the man runs", "the men runs"} & texts(held_out)
    assert sorted(map(len, sides)) == [0, 2]


def test_each_case_and_template_is_on_both_sides(tiny_model) -> None:
    frames = ("the {} runs", "a {} near", "this {} walks")
    examples = [example(a, b, case, frame) for frame in frames for a, b in PAIRS[:4] for case in ("one",)]
    examples += [example(b, a, "many", frame) for frame in frames for a, b in PAIRS[4:]]
    found_on, held_out = hold_out_half(make_prompts(examples, tiny_model))
    kinds = [Counter(zip(side.cases, side.templates, strict=True)) for side in (found_on, held_out)]
    assert kinds[0] == kinds[1] and len(kinds[0]) == 6
    assert len(found_on) + len(held_out) == len(examples) and not texts(found_on) & texts(held_out)


def test_cases_in_turn_do_not_divide_by_case(tiny_model) -> None:
    examples = [example(a, b, case) for (a, b), case in zip(PAIRS, ["one", "many"] * 3, strict=True)]
    found_on, held_out = hold_out_half(make_prompts(examples, tiny_model))
    assert set(found_on.cases) == set(held_out.cases) == {"one", "many"}


def test_two_prompts_of_a_kind_each_are_divided_and_one_pair_is_not(tiny_model) -> None:
    two = make_prompts([example("man", "men", "one"), example("dogs", "dog", "many")], tiny_model)
    assert list(map(len, hold_out_half(two))) == [1, 1]
    mirrored = make_prompts([example("man", "men", "one"), example("men", "man", "many")], tiny_model)
    with pytest.raises(UserError, match="2 usable prompts with 1 different pairs cannot be divided"):
        hold_out_half(mirrored)
