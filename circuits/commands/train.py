"""`sfc train`: autoencoders at the sites of a model."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from circuits.commands.common import Common, Output, Overwrite, load_model
from sae.training import TrainConfig, train


@dataclass(frozen=True, kw_only=True)
class Train(Common):
    """Train a sparse autoencoder at every chosen site, all from one forward pass of the model over the text."""

    model: str
    """Hugging Face model: hub name or folder."""
    text: str
    """Text: a .txt file (a document a line), a .jsonl file (field text), .gz of either, or a hub data set."""
    out: Path
    """Run folder; autoencoders go to saes/SITE."""
    sites: str = "all"
    """Sites, such as all, resid or resid_3,mlp_2."""
    resume: bool = False
    """Go on from the last checkpoint of an interrupted run with the same options."""
    overwrite: Overwrite = False
    config: Annotated[TrainConfig, tyro.conf.arg(name="")] = field(default_factory=TrainConfig)

    def run(self) -> Output:
        model = load_model(self.model, self)
        train(
            model,
            self.text,
            sites=self.sites,
            config=self.config,
            out=self.out,
            resume=self.resume,
            overwrite=self.overwrite,
            progress=not self.quiet,
        )
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
