"""`sfc train`: autoencoders at the sites of a model."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro

from circuits.commands.cache import need, open_cache
from circuits.commands.common import Common, Output, Overwrite, load_model
from sae.training import TrainConfig, train


@dataclass(frozen=True, kw_only=True)
class Train(Common):
    """Train a sparse autoencoder at every chosen site, all from one forward pass of the model over the text."""

    model: str | None = None
    """Hugging Face model: hub name or folder. With --cache it is only compared with the cache's."""
    text: str | None = None
    """Text: a .txt file (a document a line), a .jsonl file (field text), .gz of either, or a hub data set. With --cache
    it is only compared with the cache's.
    """
    cache: Path | None = None
    """Folder of `sfc cache` to read activations from; the model is not run then."""
    out: Path
    """Run folder; autoencoders go to saes/SITE."""
    sites: str = "all"
    """Sites, such as all, resid or resid_3,mlp_2."""
    resume: bool = False
    """Go on from the last checkpoint of an interrupted run with the same options."""
    overwrite: Overwrite = False
    config: Annotated[TrainConfig, tyro.conf.arg(name="")] = field(default_factory=TrainConfig)

    def run(self) -> Output:
        options: dict[str, Any] = {
            "sites": self.sites,
            "config": self.config,
            "out": self.out,
            "resume": self.resume,
            "overwrite": self.overwrite,
            "progress": not self.quiet,
        }
        if self.cache is not None:
            cache = open_cache(self.cache, model=self.model, text=self.text, sites=self.sites, device=self.device)
            train(cache.model, cache.text, activations=cache, **options)
        else:
            name, text = need(self.model, "model"), need(self.text, "text")
            train(load_model(name, self), text, **options)
        last = last_lines(self.out / "saes" / "training.jsonl")
        rows = [
            f"  {line['site']:<9} explained variance {line['explained_variance']:.3f}  L0 {line['l0']:6.1f}  "
            f"dead {line['dead']:.2f}"
            for line in last
        ]
        return Output("\n".join([*rows, f"wrote {self.out / 'saes'}"]), {"out": str(self.out), "sites": last})


def last_lines(log: Path) -> list[dict]:
    """The last line of each site in a training log."""
    if not log.is_file():
        return []
    lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    return list({line["site"]: line for line in lines}.values())
