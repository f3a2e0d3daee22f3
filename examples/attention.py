"""Why the verb looks at its subject: which features make attention look at the subject rather than at the attractor.

    python -m examples.attention --out runs/attention --saes runs/demo

1. Train autoencoders at every site of the bundled model (or take those of `--saes runs/demo`), and find the circuit of
   the verb's number in "The secretaries near the car".
2. Print through which heads its strongest edges pass, and how much every head looks from the attractor, after which the
   verb comes, to the subject.
3. Split the score of the head that looks there most over pairs of features, draw it, and try it: without the features
   that it names, does the head still look at the subject? Beside as many features that add least.

A few minutes on two cores, one with `--saes`.
"""

from __future__ import annotations

from pathlib import Path

import tyro

from circuits import Circuit, Edit, PromptSet, discover, edited, head_loadings, load_prompts, qk_attribution
from circuits.discovery.attention.qk import heads_looking, read_site
from circuits.discovery.attention.results import QKAttribution
from examples.agreement import MODEL, prompts, text
from sae import TrainConfig, load_model, load_saes, train_saes

QUERY, KEY = "attractor", "subject"
"""The verb comes after the attractor, so its position is the attractor's; both are spans of the prompts."""
FEATURES = 3
"""Features at the subject that are taken away."""


def main(
    out: Path = Path("runs/attention"), saes: Path | None = None, tokens: int = 400_000, examples: int = 200
) -> Path:
    """Tell the story; the picture is written to OUT/attention.svg.

    Args:
        out: folder for autoencoders and picture.
        saes: a run folder with autoencoders of the bundled model; trained by default.
        tokens: tokens they are trained on.
        examples: prompts that are read.
    """
    model = load_model(str(MODEL))
    config = TrainConfig(features=256, k=8, tokens=tokens)
    dictionaries = load_saes(saes) if saes else train_saes(model, text("train"), config=config, out=out)
    pairs = load_prompts(prompts("nounpp", "train"), model, limit=examples)
    held_out = load_prompts(prompts("nounpp", "test"), model, limit=examples)
    circuit = discover(model, dictionaries, pairs, method="attrib", aggregation="spans", edge_nodes=60)
    print(head_loadings(circuit, edges=5).text())

    by_number = {number: of_subject(held_out, number) for number in ("singular", "plural")}
    print("\nattention from the last word to the subject, and to that word itself:")
    for number, these in by_number.items():
        looking = heads_looking(circuit, these, query=QUERY, key=KEY, than=QUERY)[:4]
        heads = (f"attn_{row.layer} head {row.head} {row.weight:.2f}, {row.than_weight:.2f}" for row in looking)
        print(f"  {number:<9} {'; '.join(heads)}")
    looking = heads_looking(circuit, held_out, query=QUERY, key=KEY, than=QUERY)
    layer, head = next((row.layer, row.head) for row in looking if read_site(model, row.layer) in circuit.saes)
    score = qk_attribution(circuit, held_out, layer=layer, head=head, query=QUERY, key=KEY, than=QUERY)
    print(f"\n{score.text()}\n\nattn_{layer} head {head}, attention to the subject and to the last word itself:")
    for number, these in by_number.items():
        try_without(circuit, these, layer, head, number)
    out.mkdir(parents=True, exist_ok=True)
    picture = score.plot(out / "attention.svg", overwrite=True)
    print(f"\nwrote {picture}")
    return picture


def of_subject(pairs: PromptSet, number: str) -> PromptSet:
    """The prompts whose subject has this number."""
    return pairs[[row for row, case in enumerate(pairs.cases) if case.startswith(number)]]


def try_without(circuit: Circuit, pairs: PromptSet, layer: int, head: int, number: str) -> None:
    """Print where the head looks as it is, without the features that make it look at the subject, and without others.

    Those are the features that add most at the subject, and the one at the attractor that does most by its query or
    against its key; the others are as many that add least.
    """
    to_subject, to_itself = (
        qk_attribution(circuit, pairs, layer=layer, head=head, query=QUERY, key=key, progress=False)
        for key in (KEY, QUERY)
    )
    keys = features(to_subject, "keys")
    queries = features(to_subject, "queries")
    at_attractor = {name: queries.get(name, 0.0) - value for name, value in features(to_itself, "keys").items()}
    most = sorted(keys, key=lambda name: -keys[name])[:FEATURES]
    least = sorted(keys, key=lambda name: abs(keys[name]))[:FEATURES]
    named = [f"{name}@{KEY}" for name in most] + [f"{max(at_attractor, key=lambda n: at_attractor[n])}@{QUERY}"]
    others = [f"{name}@{KEY}" for name in least]
    others += [f"{min(at_attractor, key=lambda n: abs(at_attractor[n]))}@{QUERY}"]
    for what, names in (("as it is", []), (f"without {', '.join(named)}", named), ("without as many others", others)):
        with edited(circuit.model, circuit.saes, [Edit(names)] if names else [], prompts=pairs):
            rows = heads_looking(circuit, pairs, query=QUERY, key=KEY, than=QUERY)
        row = next(row for row in rows if (row.layer, row.head) == (layer, head))
        print(f"  {number:<9} {row.weight:.2f}, {row.than_weight:.2f}  {what}")


def features(score: QKAttribution, side: str) -> dict[str, float]:
    """What each feature of one side adds to a score; errors and biases left out."""
    terms = score.queries if side == "queries" else score.keys
    return {term.node: term.contribution for term in terms if term.node.rpartition("/")[2].isdecimal()}


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
