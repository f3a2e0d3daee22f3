"""Agreement with an attractor: which features keep "The secretaries near the car" from "has".

    python -m examples.attractor --out runs/attractor

1. Train autoencoders at every site of the bundled model (or take those of `--saes runs/demo`).
2. Find the circuit of the verb's number on prompts whose other noun, the attractor, has the other number; each node is
   a feature at a named span: subject, preposition, attractor.
3. Print where its effects sit, test it on nouns and verbs that were never looked at, and draw it.

A few minutes on two cores, seconds with `--saes`.
"""

from __future__ import annotations

from pathlib import Path

import tyro

from circuits import describe_features, discover, faithfulness, load_prompts
from circuits.options import FaithfulnessOptions
from circuits.prompts.dataset import PromptSet
from examples.agreement import MODEL, prompts, text
from sae import TrainConfig, load_model, load_saes, train_saes

START_SITE = "attn_1"
"""What happens in block 0 is given, as the paper gives its first layers."""


def main(
    out: Path = Path("runs/attractor"), saes: Path | None = None, tokens: int = 400_000, examples: int = 200
) -> Path:
    """Tell the story; the drawing is written to OUT/attractor.svg.

    Args:
        out: folder for autoencoders and drawing.
        saes: a run folder with autoencoders of the bundled model; trained by default.
        tokens: tokens they are trained on.
        examples: pairs of which those with an attractor are taken.
    """
    model = load_model(str(MODEL))
    config = TrainConfig(features=256, k=8, tokens=tokens)
    dictionaries = load_saes(saes) if saes else train_saes(model, text("train"), config=config, out=out)
    pairs = with_attractor(load_prompts(prompts("nounpp", "train"), model, limit=examples))
    held_out = with_attractor(load_prompts(prompts("nounpp", "test"), model, limit=examples))

    circuit = discover(model, dictionaries, pairs, aggregation="spans", edge_nodes=60)
    describe_features(circuit)
    effects = circuit.nodes_frame().groupby("position")["effect"].agg(lambda x: x.abs().sum())
    shares = (effects / effects.sum()).sort_values(ascending=False)
    print(f"{len(pairs)} prompts such as {pairs.texts[0]!r}; where the effects sit:")
    print("".join(f"  {name:<12} {share:.0%}\n" for name, share in shares.items()))
    print(circuit.text())
    start = START_SITE if START_SITE in [site.name for site in circuit.nodes] else None
    curve = faithfulness(circuit, held_out, FaithfulnessOptions(start_site=start, random=1), sizes=(10, 50))
    print(f"\non other nouns and verbs, from {start or 'the first site'} on:\n{curve.table()}")
    out.mkdir(parents=True, exist_ok=True)
    drawing = circuit.plot(out / "attractor.svg", title="Agreement with an attractor", overwrite=True)
    print(f"\nwrote {drawing}")
    return drawing


def with_attractor(pairs: PromptSet) -> PromptSet:
    """The pairs whose second noun has another number than the subject."""
    return pairs[[row for row, case in enumerate(pairs.cases) if len(set(case.split("_"))) == 2]]


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
