"""A tour as a marimo notebook, from a model to an edited model: `marimo edit examples/tour.py` (extra `notebook`).

It runs from top to bottom in seconds on the bundled model.
"""

import marimo

app = marimo.App(width="full")


@app.cell
def _():
    import tempfile
    from pathlib import Path

    import marimo as mo

    from circuits import ablate, describe_features, discover, faithfulness, load_prompts
    from sae import TrainConfig, load_model, train_saes

    agreement = Path(__file__).parent / "agreement"
    run = tempfile.mkdtemp()
    return (
        TrainConfig, ablate, agreement, describe_features, discover, faithfulness, load_model, load_prompts, mo, run,
        train_saes,
    )  # fmt: skip


@app.cell
def _(mo):
    mo.md(
        """
        # Which features make a verb agree with its subject?

        The bundled model writes *The secretary near the cars **has*** and *The secretaries near the car **have***.
        Sparse autoencoders take its activations apart into features; attribution finds those that carry the number of
        the subject from the noun to the verb; an edit tests it. Everything here is small, so that it runs in seconds:
        all sites, more tokens and more prompts give a circuit as in `sfc demo`.
        """
    )


@app.cell
def _(TrainConfig, agreement, load_model, load_prompts, run, train_saes):
    model = load_model(str(agreement / "model"))
    saes = train_saes(
        model,
        str(agreement / "text" / "train.txt"),
        sites="resid",
        config=TrainConfig(features=64, k=8, tokens=8_000),
        out=run,
        progress=False,
    )
    prompts = agreement / "prompts" / "nounpp"
    pairs = load_prompts(str(prompts / "train.jsonl"), model, limit=8)
    held_out = load_prompts(str(prompts / "test.jsonl"), model, limit=8)
    return held_out, model, pairs, saes


@app.cell
def _(describe_features, discover, model, pairs, saes):
    circuit = discover(model, saes, pairs, aggregation="spans", steps=2, edge_nodes=40)
    describe_features(circuit)
    circuit
    return (circuit,)


@app.cell
def _(mo):
    mo.md("How much of the behaviour is left when only the strongest nodes are kept, on nouns it has not seen:")


@app.cell
def _(circuit, faithfulness, held_out):
    curve = faithfulness(circuit, held_out, sizes=(10, 30))
    curve
    return (curve,)


@app.cell
def _(mo):
    mo.md("The same circuit to explore. What is clicked here is edited below; without a click, the five strongest.")


@app.cell
def _(circuit, mo):
    explorer = mo.ui.anywidget(circuit.explore(nodes=40, edges=200))
    explorer
    return (explorer,)


@app.cell
def _(ablate, circuit, explorer, held_out):
    features = explorer.widget.selected or circuit.strongest_features(5)
    edit = ablate(features, held_out, operation="mean")
    edit
    return edit, features


if __name__ == "__main__":
    app.run()
