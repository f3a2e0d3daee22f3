"""An error found, explained and mended: whose "he" is it, the subject's or that of a name nearby?

    python -m examples.mended_attractor --out runs/mended

1. stories260K goes on from "One day, Tim went to the park with Emily. There," with "she" more often than with "he": the
   name nearby, the attractor, wins over the subject, whom the story is about.
2. The circuit of this error, from prompts with an attractor of the other gender to such with one of the subject's: it
   shows at which features of the attractor's name the wrong gender enters.
3. The edit: the strongest of them are set to zero at the attractor's tokens. How many is chosen on the names that the
   circuit was found on, and measured on other names, beside as many random features.

Needs a model beside the clone (`examples/tinystories.py`); without it, it says so and ends.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import permutations
from pathlib import Path

import tyro

from circuits import Circuit, Edit, describe_features, discover, save_edits
from circuits.editing.edit import EditOptions, measure_edit
from circuits.prompts.dataset import PromptSet, make_prompts
from circuits.prompts.formats import Example
from examples import tinystories
from sae.model.language_model import LanguageModel

FRAME = "One day, {subject} went to the park with {attractor}. There,"
NAMES = {
    "train": (("Jack", "Emily"), ("Max", "Mia"), ("Tim", "Lily"), ("Bob", "Sue"), ("Joe", "Molly"), ("Peter", "Jane")),
    "test": (("Mike", "Sally"), ("Tommy", "Amy"), ("Fred", "Bella"), ("Billy", "Ella"), ("John", "Emma")),
}
"""A man's and a woman's name of equally many tokens; no name is in both."""
SIZES = (6, 12, 24, 48)
"""Numbers of features that are tried."""


@dataclass(frozen=True)
class Mended:
    """How often the model is right about the subject, on names that nothing was chosen on."""

    before: float
    """As it is."""
    after: float
    """With the edit."""
    random: float
    """With as many random features set to zero at the same tokens, mean of the draws."""
    features: list[str]
    """What is set to zero, at which span."""


def main(out: Path = Path("runs/mended"), saes: Path | None = None, tokens: int = 300_000) -> Mended | None:
    """Tell the story; the drawing is written to OUT/attractor.svg and the edit to OUT/mended.json.

    Args:
        out: folder for autoencoders, drawing and edit.
        saes: a run folder with autoencoders of the model; trained by default.
        tokens: tokens they are trained on.
    """
    if not tinystories.is_here():
        return None
    model, dictionaries = tinystories.open_model(out, saes, tokens)
    train, test = (error_prompts(model, split) for split in ("train", "test"))
    circuit = discover(model, dictionaries, train, aggregation="spans", edge_nodes=60)
    describe_features(circuit)
    names = [
        name
        for name in circuit.nodes_frame()["node"]
        if name.endswith("@attractor") and "error" not in name  # errors are no features
    ]
    print(circuit.text())
    tried = {size: right_about_the_subject(circuit, names[:size], train)[1] for size in SIZES}
    best = max(tried, key=lambda size: tried[size])
    print("\nright on the names of the circuit, by features set to zero at the attractor:")
    print("".join(f"  {size:3}  {share:.0%}\n" for size, share in tried.items()))
    chosen = names[:best]
    before, after, random = right_about_the_subject(circuit, chosen, test, draws=5)
    print(f"on other names the model is right about the subject in {before:.0%}; with {best} features of the")
    print(f"attractor set to zero in {after:.0%}, with as many random ones in {random:.0%}")
    out.mkdir(parents=True, exist_ok=True)
    drawing = circuit.plot(out / "attractor.svg", title="Why the nearer name wins", overwrite=True)
    save_edits(Edit(chosen, "zero"), out / "mended.json", overwrite=True)
    print(f"wrote {drawing} and {out / 'mended.json'}")
    return Mended(before, after, random, chosen)


def error_prompts(model: LanguageModel, split: str) -> PromptSet:
    """Pairs whose clean prompt has an attractor of the other gender, whose pronoun, the error, is the clean answer."""
    examples = []
    for (man, woman), (other_man, other_woman) in permutations(NAMES[split], 2):
        for subject, wrong, same, pronouns in (
            (man, other_woman, other_man, (" he", " she")),
            (woman, other_man, other_woman, (" she", " he")),
        ):
            right, error = pronouns
            clean, patch = (FRAME.format(subject=subject, attractor=name) for name in (wrong, same))
            examples.append(Example(clean, (error,), patch, (right,), case=f"{right.strip()}, not {error.strip()}",
                                    template=FRAME))  # fmt: skip
    return make_prompts(examples, model, need_spans=True)


def right_about_the_subject(
    circuit: Circuit, features: list[str], prompts: PromptSet, *, draws: int = 0
) -> tuple[float, float, float]:
    """Share of prompts with the subject's pronoun ahead: as it is, edited, and with random features edited."""
    options = EditOptions(n_random=draws, resamples=0)
    report = measure_edit(circuit.model, circuit.saes, Edit(features, "zero"), prompts, options)
    # The error is the clean answer, so that accuracy is the share of errors.
    right = [1 - (one.overall.accuracy or 0.0) for one in (report.before, report.after, *report.random)]
    drawn = right[2:]
    return right[0], right[1], sum(drawn) / len(drawn) if drawn else float("nan")


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
