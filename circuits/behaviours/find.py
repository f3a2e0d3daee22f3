"""Behaviours nobody listed: find them in a text, and a circuit for each (Michaud et al. 2023; Marks et al. 2024, §5).

1. Contexts whose next token the model predicts well (`circuits.behaviours.contexts`).
2. A vector for each: effects of features on log p of the next token, or activations, or gradients
   (`circuits.behaviours.representation`).
3. Clusters of vectors, ranked by purity and size (`circuits.behaviours.clusters`).
4. A circuit for each of the first clusters: `discover` on its contexts, without patch prompts, with the metric
   -log p(answer).

With a folder, finished batches and circuits are kept, and an interrupted search goes on to the same end.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from circuits.attribution.activations import Setting
from circuits.attribution.node_effects import check_allowed
from circuits.behaviours.clusters import Cluster, cluster_vectors, project, ranked_clusters
from circuits.behaviours.contexts import Contexts, read_contexts
from circuits.behaviours.options import BehaviourSearchOptions
from circuits.behaviours.representation import context_vectors
from circuits.behaviours.results import Behaviours
from circuits.circuit import FEATURES_FILE, GRAPH_FILE, PARTIAL_FOLDER, Circuit
from circuits.discovery.discover import discover
from circuits.discovery.resume import ResumeFolder, identity_of, interrupted, remove_partial
from circuits.options import DiscoverOptions
from sae._files import prepare_folder, remove_temporary, write_json, write_text
from sae._progress import ProgressBar
from sae._run.contents import BEHAVIOUR, remove
from sae.autoencoder import SparseAutoencoder
from sae.features.contexts import top_contexts
from sae.model.language_model import LanguageModel
from sae.model.sites import Site

METRIC = "log_probability"
DESCRIBED_ON = 500
"""Contexts on which features of circuits are described, at most."""


def find_behaviours(
    model: LanguageModel,
    saes: Mapping[Site, SparseAutoencoder],
    texts: str | Path | Iterable[str],
    options: BehaviourSearchOptions | None = None,
    *,
    out: str | Path | None = None,
    resume: bool = False,
    provenance: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> Behaviours:
    """Find behaviours in a text: contexts predicted well, clustered by the features that predict them.

    Args:
        model: The model.
        saes: An autoencoder for every site that is looked at.
        texts: Documents, a .txt or .jsonl file, or a hub data set.
        options: Which contexts, how they are represented and clustered, how many clusters get a circuit.
        out: Folder for finished batches, circuits (`cluster_01/circuit`, ...) and their prompts; none by default.
        resume: Go on with what is finished there.
        provenance: Names of model and SAEs, stored with the circuits.
        progress: Whether progress bars are shown.

    Returns:
        The clusters in order of rank, each with its contexts, and the circuits of the first ones, whose effects are in
        nats of -log p of the next token.

    Raises:
        UserError: The model predicts no token of the text well enough, or the folder holds other work.
    """
    options = options or BehaviourSearchOptions()
    setting = Setting.of(model, saes, METRIC)
    check_allowed(model, options.method)
    contexts = read_contexts(model, texts, options)
    files = None
    if out is not None:
        files = ResumeFolder(Path(out) / PARTIAL_FOLDER, _identity(setting, contexts, options), resume=resume)
    vectors = context_vectors(setting, contexts.prompts, options, files=files, progress=progress)
    z = project(vectors, options)
    labels = cluster_vectors(z, options)
    answers = model.token_strings(contexts.prompts.clean_answers.tolist())
    clusters = ranked_clusters(z, labels, answers)
    chosen = clusters[: options.circuits]
    circuits: dict[int, Circuit] = {}
    with ProgressBar(total=len(chosen), desc="circuits", unit="cluster", disable=not progress) as bar:
        for cluster in chosen:
            folder = None if out is None else Path(out) / cluster.name
            circuits[cluster.rank] = _circuit(setting, contexts, cluster, options, folder, provenance or {}, resume)
            bar.update()
    _describe(setting, circuits, contexts)
    if out is not None:
        for folder in set(Path(out).glob("cluster_*")) - {Path(out) / cluster.name for cluster in chosen}:
            remove(folder, BEHAVIOUR)  # of a search that was killed, and was for more clusters
        for rank, circuit in circuits.items():
            write_json(
                Path(out) / clusters[rank - 1].name / "circuit" / FEATURES_FILE,
                {"schema_version": 1, "features": circuit.features},
            )
    return Behaviours(contexts, clusters, circuits, options, answers)


def _identity(setting: Setting, contexts: Contexts, options: BehaviourSearchOptions) -> dict[str, Any]:
    """All that decides the vectors; how they are clustered is not among it."""
    deciding = {name: value for name, value in asdict(options).items() if name in ("represent", "memory")}
    return identity_of(setting, contexts.prompts, deciding)


def _circuit(
    setting: Setting,
    contexts: Contexts,
    cluster: Cluster,
    options: BehaviourSearchOptions,
    folder: Path | None,
    provenance: Mapping[str, Any],
    resume: bool,
) -> Circuit:
    """The circuit of a cluster, taken from its folder where it is finished there."""
    members = cluster.members[: options.examples]
    prompts = contexts.prompts[members]
    about = {
        **provenance,
        "prompts_fingerprint": prompts.fingerprint,
        "examples": len(members),
        "span_template": None,
        "need_spans": False,
        "title": f"Behaviour {cluster.rank}: predicts {', '.join(repr(answer) for answer, _ in cluster.answers[:3])}",
    }
    how = DiscoverOptions(method=options.method, metric=METRIC, edge_nodes=options.nodes, memory=options.memory)
    if folder is None:
        return discover(setting.model, setting.saes, prompts, how, provenance=about, progress=False)
    for outdated in (folder, folder / "graph"):
        remove_temporary(outdated)
    about["prompts"] = str((folder / "prompts.jsonl").resolve())
    circuit_folder, partial = folder / "circuit", folder / "circuit" / PARTIAL_FOLDER
    if resume and (circuit_folder / GRAPH_FILE).is_file() and not interrupted(partial):
        finished = Circuit.load(circuit_folder, model=setting.model, saes=setting.saes)
        options_then = finished.metadata["options"]
        if finished.metadata["prompts_fingerprint"] == prompts.fingerprint and options_then == asdict(how):
            return finished
    prepare_folder(circuit_folder, overwrite=True)
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in contexts.rows(setting.model, members)]
    write_text(folder / "prompts.jsonl", "".join(lines))
    circuit = discover(
        setting.model, setting.saes, prompts, how, provenance=about, progress=False, partial=partial,
        resume=resume and interrupted(partial),
    )  # fmt: skip
    circuit.save(circuit_folder, overwrite=True)
    remove_partial(partial)
    return circuit


def _describe(setting: Setting, circuits: Mapping[int, Circuit], contexts: Contexts) -> None:
    """Describe the features of all circuits by the tokens they are strongest on in the contexts."""
    features: dict[Site, set[int]] = {}
    for circuit in circuits.values():
        for site, index in circuit.features_with_edges().items():
            features.setdefault(site, set()).update(index)
    if not features:
        return
    n = min(len(contexts), DESCRIBED_ON)
    texts = [contexts.prompts.texts[len(contexts) * number // n] for number in range(n)]  # evenly spaced
    asked = {site: sorted(index) for site, index in sorted(features.items())}
    described = top_contexts(setting.model, setting.saes, texts, asked)
    for circuit in circuits.values():
        circuit.features.clear()
        for site, index in circuit.features_with_edges().items():
            for feature in index:
                summary = described[site, feature].to_dict()
                about = {key: value for key, value in summary.items() if key not in ("site", "index")}
                circuit.features[f"{site.name}/{feature}"] = about
