"""He or she: how a real model remembers whether the story is about Jack or Emily.

    python -m examples.pronoun_gender --out runs/gender

1. Train autoencoders at the residual stream of stories260K.
2. Find the circuit of logit( she) - logit( he) between "Jack was sad because" and "Emily was sad because".
3. Test it on pairs that it was not found on, and draw it.

Needs a model beside the clone (`examples/tinystories.py`); without it, it says so and ends.
"""

from __future__ import annotations

from pathlib import Path

import tyro

from circuits import ablate, describe_features, discover, faithfulness, load_prompts
from circuits.options import FaithfulnessOptions
from examples import tinystories


def main(
    out: Path = Path("runs/gender"), saes: Path | None = None, tokens: int = 300_000, examples: int = 100
) -> Path | None:
    """Tell the story; the drawing is written to OUT/gender.svg.

    Args:
        out: folder for autoencoders and drawing.
        saes: a run folder with autoencoders of the model; trained by default.
        tokens: tokens they are trained on.
        examples: pairs that the circuit is found on, and tested on.
    """
    if not tinystories.is_here():
        return None
    model, dictionaries = tinystories.open_model(out, saes, tokens)
    pairs = load_prompts(tinystories.PRONOUNS / "train.jsonl", model, limit=examples)
    held_out = load_prompts(tinystories.PRONOUNS / "test.jsonl", model, limit=examples)
    circuit = discover(model, dictionaries, pairs, edge_nodes=60)
    describe_features(circuit)
    print(circuit.text())
    curve = faithfulness(circuit, held_out, FaithfulnessOptions(random=1), sizes=(10, 50, 100))
    print(f"\nhow much of it so many nodes carry on other pairs:\n{curve.table()}")
    print(f"\n{ablate(circuit.strongest_features(10), held_out).text()}")
    out.mkdir(parents=True, exist_ok=True)
    drawing = circuit.plot(out / "gender.svg", title="He or she in stories260K", overwrite=True)
    print(f"\nwrote {drawing}")
    return drawing


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
