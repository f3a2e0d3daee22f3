"""Clusters of contexts beside rules of the grammar: `python -m tests.benchmarks.bench_behaviours --saes RUN`.

Every token of a text of the bundled grammar was made by a known rule (`examples/agreement/rules.py`). Printed is the
adjusted mutual information of that rule with clusters of the contexts that the model predicts well: by effects of
features, by their activations, by gradients, and by what the autoencoders were not asked for, raw residual vectors at
the last token of each site, clustered by k-means (the usual way) and by the average linkage that the effects get.
`--saes` is the run folder of a demo.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from itertools import islice

import numpy as np
import torch
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_mutual_info_score
from sklearn.preprocessing import normalize

from circuits.attribution.activations import Setting
from circuits.behaviours.clusters import cluster_vectors, project
from circuits.behaviours.contexts import Contexts, read_contexts
from circuits.behaviours.options import BehaviourSearchOptions
from circuits.behaviours.representation import context_vectors
from examples.agreement import MODEL
from examples.agreement.rules import labelled_documents
from sae.model.language_model import LanguageModel
from sae.model.load import load_model
from sae.model.sites import Site
from sae.saes import load_saes

SEED = 10_000_020
"""Of the documents: those of the validation text, which no autoencoder was trained on."""
BATCH = 64


@torch.no_grad()
def residual_vectors(model: LanguageModel, contexts: Contexts, sites: list[Site]) -> dict[str, np.ndarray]:
    """The residual stream at the last token of every context, [N, d] per site."""
    batches = [model.run(batch.clean, capture=sites, need_logits=False) for batch in contexts.prompts.batches(BATCH)]
    return {site.name: torch.cat([run.activations[site][:, -1] for run in batches]).numpy() for site in sites}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--saes", required=True, help="run folder of a demo")
    parser.add_argument("--represent", nargs="*", default=("effects", "activations", "gradients"))
    parser.add_argument("--documents", type=int, default=1500)
    parser.add_argument("--contexts", type=int, default=3000)
    parser.add_argument("--surprise", type=float, nargs="*", default=(1.0, 2.0))
    parser.add_argument("--likeness", type=float, default=0.25, help="last column: average linkage ends there")
    parser.add_argument("--clusters", type=int, nargs="*", default=(15, 20, 30))
    asked = parser.parse_args()
    model = load_model(str(MODEL))
    setting = Setting.of(model, load_saes(asked.saes), "log_probability")
    documents = list(islice(labelled_documents(asked.documents, seed=SEED), asked.documents))
    sites = [Site("resid", layer) for layer in range(model.n_layers)]
    for surprise in asked.surprise:
        options = BehaviourSearchOptions(
            surprise=surprise, contexts=asked.contexts, tokens=10**6, context_length=model.max_positions or 128
        )
        contexts = read_contexts(model, [text for text, _ in documents], options)
        known = [documents[d][1][p - 1] for d, p in zip(contexts.document, contexts.position, strict=True)]
        answers = contexts.prompts.clean_answers.tolist()
        by_answer = adjusted_mutual_info_score(known, answers)
        n_rules, n_answers = len(set(known)), len(set(answers))
        print(f"\n-log p below {surprise:g}: {len(contexts)} contexts of {n_rules} rules, {n_answers} answers")
        print(f"the answer itself: {by_answer:.3f}\n{'adjusted mutual information with the rules at K =':50}", end="")
        print("".join(f"{k:>8}" for k in asked.clusters) + f"   likeness {asked.likeness:g}", flush=True)
        alike = replace(options, likeness=asked.likeness)
        for represent in asked.represent:
            started = time.monotonic()
            chosen = replace(options, represent=represent)
            z = project(context_vectors(setting, contexts.prompts, chosen, progress=False), chosen)
            rows = [cluster_vectors(z, replace(chosen, clusters=k)) for k in asked.clusters]
            rows.append(cluster_vectors(z, alike))
            _print(f"{represent} ({time.monotonic() - started:.0f} s)", known, rows)
        for site, x in residual_vectors(model, contexts, sites).items():
            by_means = [KMeans(k, n_init=3, random_state=0).fit_predict(x) for k in asked.clusters]
            _print(f"{site}, raw, k-means", known, by_means)
            unit = normalize(x.astype(float))
            linked = [cluster_vectors(unit, replace(options, clusters=k)) for k in asked.clusters]
            linked.append(cluster_vectors(unit, alike))
            _print(f"{site}, unit length, average linkage", known, linked)


def _print(name: str, known: list[str], rows: list[np.ndarray]) -> None:
    numbers = "".join(f"{adjusted_mutual_info_score(known, row):8.3f}" for row in rows)
    print(f"{name:50}{numbers}  (the last: {len(set(rows[-1]))} clusters)", flush=True)


if __name__ == "__main__":
    main()
