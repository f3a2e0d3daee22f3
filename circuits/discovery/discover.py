"""From prompts to a circuit (Marks et al. 2024, sections 3 and 4).

1. Node pass (`circuits.discovery.node_pass`): for every batch of prompts, clean and patch activations, then the effects
   of all features and errors (`circuits.attribution`), held against the measured effect of patching each site alone.
2. Aggregate over positions and examples; choose the strongest nodes.
3. Edge pass (`circuits.discovery.edge_pass`): for every batch, edges among those nodes and to the metric by the cut
   graph (`circuits.attribution.edges`). Where they fit, the weights of every example are kept for intervals
   (`circuits.uncertainty.intervals`).

Finished batches can be kept in a folder (`circuits.discovery.resume`), from which an interrupted discovery goes on, and
over which several processes (`sae._run.processes`) share the batches; each of them then returns the same circuit.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from circuits.attribution.nodes import Nodes, count, select_nodes
from circuits.circuit import Circuit
from circuits.circuit_source import CircuitSource
from circuits.discovery.batching import DiscoveryRun
from circuits.discovery.edge_pass import by_case, edge_pass
from circuits.discovery.metadata import circuit_metadata
from circuits.discovery.node_pass import all_effects, node_pass
from circuits.discovery.resume import ResumeFolder, identity_of, interrupted
from circuits.metrics.identity import names_code
from circuits.metrics.metrics import (
    Metric,
    mean_accuracy,
    metric_fingerprint,
    metric_name,
)
from circuits.metrics.probe import Probe
from circuits.options import DiscoverOptions
from circuits.prompts.dataset import PromptSet
from sae._run.locks import lock
from sae._run.processes import current
from sae.autoencoder import SparseAutoencoder
from sae.errors import UserError
from sae.model.forward import with_gradients
from sae.model.language_model import LanguageModel
from sae.model.sites import Site


@with_gradients
def discover(
    model: LanguageModel,
    saes: Mapping[Site, SparseAutoencoder],
    prompts: PromptSet,
    options: DiscoverOptions | None = None,
    *,
    metric: str | Metric | None = None,
    provenance: Mapping[str, Any] | None = None,
    progress: bool = True,
    partial: str | Path | None = None,
    resume: bool = False,
    only: Nodes | None = None,
    **changes: Any,
) -> Circuit:
    """Find the circuit behind `prompts`, over the features and errors of `saes` (Marks et al. 2024).

    Args:
        model: the model that shows the behaviour.
        saes: an autoencoder for every site of the circuit.
        prompts: minimal pairs, or prompts alone, whose effects are then those of zeroing nodes.
        options: how the circuit is computed; the command line's defaults by default.
        metric: a function m(logits [B, V], prompts) -> [B] that rises as the behaviour breaks, or the name of one; the
            logit difference by default.
        provenance: names of model, SAEs and prompts, stored in the metadata.
        progress: whether progress bars are shown.
        partial: folder for finished batches; they are the caller's to remove once the circuit is saved.
        resume: go on with the batches that are finished there.
        only: the nodes that the circuit is of, such as those that a mask keeps; all with an effect by default.
        changes: single fields of `DiscoverOptions`, such as `method="attrib"`, `edge_nodes=100`.

    Returns:
        The circuit, with the effects of all nodes and the edges among the strongest.

    Raises:
        UserError: for prompts, sites or options that do not fit each other, and where no node has an effect.
    """
    options = replace(options or DiscoverOptions(), **changes)
    explained = options.metric if metric is None else metric
    options = replace(options, metric=metric_name(explained))
    run = DiscoveryRun.of(model, saes, prompts, options, metric=explained, progress=progress)
    _check_aggregation(prompts, options.aggregation)
    accuracy = None if isinstance(run.setting.metric, Probe) else mean_accuracy(model, prompts)
    with nullcontext() if partial is None else lock(Path(partial)):  # two discoveries never mix their batches
        if partial is not None:
            run = replace(run, files=_resume_folder(run, partial, resume=resume))
        batches = node_pass(run)
        every, nodes = all_effects(run, batches)
        effects = every
        if only is not None:
            effects, nodes = all_effects(run, batches, only)
        if not count(nodes):
            raise UserError("no node has an effect on the metric: do the prompts differ where the sites can see it?")
        strongest = select_nodes(nodes, top=options.edge_nodes) if options.edge_nodes else {}
        edges, edge_samples = edge_pass(run, batches, strongest) if strongest else ({}, {})
    provenance = {**(provenance or {}), "accuracy": accuracy, "n_nodes": count(nodes)}
    metadata = circuit_metadata(model, run, batches, every, provenance)
    source = CircuitSource(model, run.setting.saes, run.setting.metric, prompts)  # as given: not for this metric alone
    return Circuit(
        effects, strongest, edges, metadata, edge_cases=by_case(edge_samples, prompts.cases), edge_samples=edge_samples,
        groups=prompts.groups, source=source,
    )  # fmt: skip


def _resume_folder(run: DiscoveryRun, partial: str | Path, *, resume: bool) -> ResumeFolder:
    """The folder of finished batches; `UserError` where those in it are of another discovery, or cannot be compared."""
    name, fingerprint = run.options.metric, metric_fingerprint(run.setting.metric)
    if resume and names_code(name) and fingerprint is None and interrupted(partial):
        raise UserError(
            f"the metric {name!r} cannot be compared with that of the interrupted discovery (it is no plain Python "
            "function): start again with --overwrite"
        )
    identity = identity_of(run.setting, run.prompts, asdict(run.options) | {"metric_fingerprint": fingerprint})
    return current().by_first(lambda: ResumeFolder(partial, identity, resume=resume))


def _check_aggregation(prompts: PromptSet, aggregation: str) -> None:
    """Raise UserError where the prompts cannot be aggregated so."""
    if aggregation == "position" and int(prompts.clean.lengths.min()) != prompts.clean.n_positions:
        lengths = sorted(set(prompts.clean.lengths.tolist()))
        raise UserError(f"aggregation 'position' needs prompts of equal length, found lengths {lengths}: use sum")
    if aggregation == "spans" and prompts.span_numbers is None:
        raise UserError("aggregation 'spans' needs prompts with spans: name them in the file, or give a span template")
