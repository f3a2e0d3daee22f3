"""Behaviours that nobody asked for: what the bundled model predicts well, and by which features.

    python -m examples.behaviours --saes runs/demo --out runs/behaviours

1. Take contexts of unseen text whose next token the model predicts with a -log p below 2 nats.
2. Cluster them by the effects of features on that prediction, and find a circuit for each of the first clusters.
3. Hold the clusters against the grammar that wrote the text: it knows which rule made each word.

OUT/index.html lists the clusters; each opens its circuit. Two minutes on two cores, a few more without `--saes`.
"""

from __future__ import annotations

from collections import Counter
from itertools import islice
from pathlib import Path

import tyro

from circuits import BehaviourSearchOptions, find_behaviours
from examples.agreement import MODEL, text
from examples.agreement.rules import labelled_documents
from sae import TrainConfig, load_model, load_saes, train_saes

SEED = 10_000_020
"""Of the documents: those of the validation text."""


def main(
    out: Path = Path("runs/behaviours"),
    saes: Path | None = None,
    tokens: int = 400_000,
    contexts: int = 1500,
    circuits: int = 8,
) -> Path:
    """Tell the story; the page is written to OUT/index.html.

    Args:
        out: folder for autoencoders, circuits and page.
        saes: a run folder with autoencoders of the bundled model; trained by default.
        tokens: tokens they are trained on.
        contexts: contexts that are clustered.
        circuits: clusters that get a circuit.
    """
    model = load_model(str(MODEL))
    config = TrainConfig(features=256, k=8, tokens=tokens)
    dictionaries = load_saes(saes) if saes else train_saes(model, text("train"), config=config, out=out / "run")
    documents = list(islice(labelled_documents(contexts, seed=SEED), contexts))
    options = BehaviourSearchOptions(surprise=2.0, contexts=contexts, circuits=circuits, tokens=20 * contexts)
    found = find_behaviours(model, dictionaries, [text for text, _ in documents], options, out=out)
    known = [documents[d][1][p - 1] for d, p in zip(found.contexts.document, found.contexts.position, strict=True)]
    print(found.text())
    print("\nwhich rules of the grammar made the answers:")
    for cluster in found.clusters[:circuits]:
        rules = Counter(known[member] for member in cluster.members).most_common(3)
        print(f"  {cluster.rank:3}  " + ", ".join(f"{rule} {n / len(cluster.members):.0%}" for rule, n in rules))
    print(f"adjusted mutual information of clusters and rules: {found.agreement(known):.2f}")
    page = found.write_page(out, title="What the bundled model predicts well", overwrite=True)
    print(f"wrote {page}")
    return page


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
