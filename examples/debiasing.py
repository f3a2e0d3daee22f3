"""Debiasing a classifier: `python -m examples.debiasing --out runs/debiasing`, a few minutes.

A probe is to say whether the subject of a sentence is singular or plural. Where it is trained, the other noun of the
sentence always has the same number, and the other noun is what it learns. SHIFT finds the features that it rests on,
ablates those that have to do with the other noun, and never sees a sentence in which the two disagree.

A second probe is trained where plural subjects are people and singular ones things. No single word says which noun is
the subject, so that there is nothing in the embedding to ablate; SHIFT finds features that the model has computed.

Leaves attractor.svg and subject.svg, a row a probe, and .json files with every feature and what was said of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from circuits import ShiftOptions, shift
from circuits.debiasing.plots import plot_shift
from circuits.debiasing.results import ShiftReport
from examples import agreement
from examples.agreement.make_labelled import SETS, labelled
from sae import TrainConfig, load_model, load_saes, train_saes

PROBES = {"attractor": ("resid_2", "resid"), "subject": ("resid_3", "all")}
"""Where the probe of each set reads, and which sites are judged. Ablation mends a probe where what it learned holds
something of what is intended: at the adverb that is so at the last site alone, where sublayers write both.
"""


@dataclass(frozen=True)
class DebiasingConfig:
    """How large the story is, and where it goes."""

    out: Path = Path("runs/debiasing")
    """folder that receives autoencoders and pictures"""
    saes: Path | None = None
    """autoencoders at all sites of the bundled model, in place of training some"""
    tokens: int = 400_000
    """tokens they are trained on"""
    train: int = 800
    """texts with both labels"""
    concept: int = 400
    """texts with the spurious label alone, which the judge looks at"""
    test: int = 400
    """texts to test on"""
    steps: int = 10
    """quadrature nodes of the circuits"""
    seed: int = 0
    """of the texts"""


def debias(config: DebiasingConfig, sets: Sequence[str] = SETS) -> dict[str, ShiftReport]:
    """Tell the story; the report of each set of texts."""
    model = load_model(str(agreement.MODEL))
    if config.saes is not None:
        saes = load_saes(config.saes)
    else:
        training = TrainConfig(features=256, k=8, tokens=config.tokens)
        sites = "all" if "subject" in sets else "embed,resid"
        saes = train_saes(model, str(agreement.text("train")), sites=sites, config=training, out=config.out)
    reports = {}
    for name in sets:
        train, concept, test = (
            labelled(name, split, getattr(config, split), seed=config.seed) for split in ("train", "concept", "test")
        )
        site, sites = PROBES[name]
        options = ShiftOptions(site=site, sites=sites, position="last", tokens="read", steps=config.steps)
        report = shift(model, saes, train, test, options, concept=concept, progress=False)
        config.out.mkdir(parents=True, exist_ok=True)
        plot_shift(report, config.out / f"{name}.svg")
        report.save(config.out / f"{name}.json")
        reports[name] = report
    return reports


if __name__ == "__main__":
    for set_name, of_set in debias(tyro.cli(DebiasingConfig, description=__doc__)).items():
        print(f"\n{set_name}: {of_set.text()}")
