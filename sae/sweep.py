"""Sweeps: a grid of architectures, widths, sparsities and seeds at every site, from one forward pass a batch of text.

1. `grid` makes a `TrainConfig` for each combination, named by what varies ("batchtopk-1024-k32-seed0");
2. `sweep` trains all of them at all sites on the same activations, so they differ in nothing else, and leaves
   each in its own run folder `out`/NAME/saes/<site>/, which everything that takes a run folder reads.

What concerns the data (tokens, batch, context, buffer) must be equal in all; one optimizer step moves them all.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path

from sae import checkpoint as checkpoints
from sae.activations import ActivationSource, ContextStream, ModelActivations
from sae.architectures import architecture
from sae.autoencoder import SparseAutoencoder
from sae.config import TrainConfig
from sae.errors import UserError
from sae.files import write_json
from sae.learner import Learner
from sae.model import LanguageModel
from sae.sites import Site, select_sites
from sae.text import TextSource
from sae.training import Trainer, run_settings, start_folder

SHARED = (
    "tokens", "batch_size", "context_length", "packed", "exclude_special", "buffer_tokens", "log_steps", "checkpoints",
)  # fmt: skip
"""Options that all configs of a sweep have in common."""


def grid(
    base: TrainConfig | None = None,
    *,
    architectures: Sequence[str] = ("topk",),
    features: Sequence[int] = (1024,),
    k: Sequence[int] = (32,),
    seeds: Sequence[int] = (0,),
) -> dict[str, TrainConfig]:
    """Every combination, by name; all other options from `base`. Architectures that are not trained appear once."""
    base = base or TrainConfig()
    configs = {}
    for name, width, active, seed in product(architectures, features, k, seeds):
        config = replace(base, architecture=name, features=width, k=active, seed=seed)
        trained = architecture(name).trained
        configs[f"{name}-{width}-k{active}-seed{seed}" if trained else name] = config
    return configs


def sweep(
    model: LanguageModel,
    texts: str | Path | Iterable[str] | TextSource,
    configs: Mapping[str, TrainConfig],
    *,
    sites: str | Sequence[str | Site] = "all",
    out: str | Path,
    resume: bool = False,
    overwrite: bool = False,
    progress: bool = True,
    activations: ActivationSource | None = None,
) -> dict[str, dict[Site, SparseAutoencoder]]:
    """Trains every config at every site from the same activations; autoencoders by config and site."""
    out, source = Path(out), TextSource.of(texts)
    first = _shared(configs)
    names = sites if isinstance(sites, str) else [str(site) for site in sites]
    chosen = select_sites(names, model.sites)
    learners = [
        Learner(f"{name}/{site}", site, model.widths[site], config, model.device)
        for name, config in configs.items()
        for site in chosen
    ]
    start_folder(out, run_settings(model, source, chosen, configs), resume=resume, overwrite=overwrite)
    if activations is None:
        stream = ContextStream(model, source, context_length=first.context_length, packed=first.packed)
        activations = ModelActivations(model, stream, chosen, exclude_special=first.exclude_special)
    Trainer(learners, activations, first, out=out, progress=progress).run()
    saes: dict[str, dict[Site, SparseAutoencoder]] = {name: {} for name in configs}
    for learner in learners:
        name = learner.name.removesuffix(f"/{learner.site}")
        saes[name][learner.site] = learner.export(model=model.name, fingerprint=model.fingerprint)
        saes[name][learner.site].save(out / name / "saes" / learner.site.name)
    for name, config in configs.items():
        write_json(out / name / "config.json", run_settings(model, source, chosen, config))
    checkpoints.remove(out / "checkpoints")
    return saes


def _shared(configs: Mapping[str, TrainConfig]) -> TrainConfig:
    """Any of the configs, after a check that they agree in what they share."""
    if not configs:
        raise UserError("a sweep of no configs: give at least one")
    first_name, first = next(iter(configs.items()))
    for name, config in configs.items():
        for option in SHARED:
            mine, theirs = getattr(config, option), getattr(first, option)
            if mine != theirs:
                raise UserError(f"{option} is {mine} in {name!r} and {theirs} in {first_name!r}: a sweep has only one")
    return first
