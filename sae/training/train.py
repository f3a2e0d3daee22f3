"""Training of the dictionaries of a run, by one process or several.

1. What several processes share out is chosen (`sae.training.parallel`); the first of them looks after the folder.
2. `Trainer` trains those of this process.
3. Each is exported to `saes/<site>/`; once all are there, the run is marked as complete.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

from sae._run.locks import lock
from sae._run.processes import current
from sae.autoencoder import SparseAutoencoder
from sae.data.activations import ActivationSource, ModelActivations
from sae.data.cache import CachedActivations, CachedModel
from sae.data.shared_activations import SharedActivations
from sae.data.text import TextSource
from sae.model.forward import with_gradients
from sae.model.language_model import LanguageModel
from sae.model.sites import Site, select_sites
from sae.saes import SAEs, load_saes
from sae.sparse.shards import FeatureShards
from sae.training.config import TrainConfig, with_contexts_of
from sae.training.parallel import DataTrainer, FeatureTrainer, Parallel, choose_parallel, share_sites
from sae.training.run_folder import RunFolder, run_settings
from sae.training.trainer import Trainer, begin, export, open_activations, read_site
from sae.training.training_sae import TrainingSAE

TRAINERS: dict[Parallel, type[Trainer]] = {"sites": Trainer, "data": DataTrainer, "features": FeatureTrainer}


@with_gradients
def train_saes(
    model: LanguageModel | CachedModel,
    texts: str | Path | Iterable[str] | TextSource,
    *,
    sites: str | Sequence[str | Site] = "all",
    config: TrainConfig | None = None,
    out: str | Path,
    resume: bool = False,
    overwrite: bool = False,
    progress: bool = True,
    activations: CachedActivations | None = None,
    parallel: Parallel | None = None,
) -> SAEs:
    """Train a sparse autoencoder at each site, all from the same forward passes of the model over a text; at the MLPs
    transcoders, where the config says so.

    Args:
        model: the model; `cache.model` with `activations`, which is never run.
        texts: documents, a .txt or .jsonl file, or a hub data set; read again from its beginning where it is too short.
        sites: "all", a kind such as "resid", or sites such as ["resid_3", "mlp_2"].
        config: size, architecture and length of the training; see `TrainConfig`, whose defaults the command has too.
        out: the run folder: autoencoders go to `out`/saes/<site>, the log to `out`/saes/training.jsonl.
        resume, overwrite: go on with an interrupted run of the same options, or replace an earlier run in `out`.
        progress: whether to show a bar on standard error.
        activations: a cache to read instead of running the model.
        parallel: what several processes (`sfc train --processes`) share out: sites, each training some of them, or
            data, each training all on its share of every batch, or features, each having a block of those of every
            autoencoder; sites by default where there is one for each.

    Returns:
        The autoencoders by site, in the order of the forward pass, with unit decoder rows, for raw activations; of
        several processes each returns those that it trained.

    Raises:
        UserError: an option or a site does not exist, the folder holds something else, or training diverges.
    """
    config, out, source, processes = config or TrainConfig(), Path(out), TextSource.of(texts), current()
    chosen = select_sites(sites, model.sites)
    config = config if activations is None else with_contexts_of(activations, config)
    cache = None if activations is None else activations.identity
    parallel = choose_parallel(parallel, chosen, config, processes, cached=cache is not None)
    run = RunFolder(out, "train", run_settings(model, source, chosen, config, cache=cache))
    with lock(out):
        if processes.by_first(lambda: resume and run.finished()):
            return run.load(model.device)
        saes, rows = share_of_work(model, source, chosen, config, parallel, cache=activations)
        processes.by_first(lambda: run.start(resume=resume, overwrite=overwrite))
        trainer = TRAINERS[parallel](saes, rows, config, run, progress=progress, processes=processes)
        trainer.run()
        exported: dict[Site, SparseAutoencoder] = {}
        for sae in saes:
            if (trained := trainer.to_save(sae)) is not None:
                exported[sae.site] = export(trained, model, rows)
                if parallel == "sites" or processes.is_first:
                    run.save({sae.site: exported[sae.site]})
            if parallel == "features":  # which may not fit in memory together
                exported.clear()
        processes.gathered(None)
        processes.by_first(lambda: run.finish(read=asdict(rows.text_read())))
        processes.gathered(None)
    if not exported or len({sae.device for sae in exported.values()}) > 1:  # each where its layer is
        return load_saes(out, sites=[sae.site for sae in saes], device=model.device)
    return SAEs(exported)


def share_of_work(
    model: LanguageModel | CachedModel,
    source: TextSource,
    sites: Sequence[Site],
    config: TrainConfig,
    parallel: Parallel,
    *,
    cache: CachedActivations | None,
) -> tuple[list[TrainingSAE], ActivationSource]:
    """The autoencoders, or blocks of them, that this process trains, before their first step, and their activations."""
    processes = current()
    shares = share_sites(sites, processes.size)
    rows = open_activations(model, source, sites, config, cache=cache)
    if processes.size > 1 and isinstance(rows, ModelActivations):
        shown = shares if parallel == "sites" else [sites] * processes.size
        needed = [{where for site in share for where in (site, read_site(site, config))} for share in shown]
        rows = SharedActivations(rows, processes, needed)
    mine = shares[processes.rank] if parallel == "sites" else sites
    shards = FeatureShards(processes) if parallel == "features" else None
    return [begin(site.name, site, rows, config, model, shards=shards) for site in mine], rows
