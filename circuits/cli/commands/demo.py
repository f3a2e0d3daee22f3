"""`sfc demo`: the whole story on the bundled model, from training to an edited model, in a few minutes on two cores."""

from __future__ import annotations

import importlib.resources
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from circuits.cli.commands.circuits.attention import AttentionCommand
from circuits.cli.commands.circuits.discover import DiscoverCommand
from circuits.cli.commands.dictionaries.evaluate import EvaluateCommand
from circuits.cli.commands.dictionaries.train import TrainCommand
from circuits.cli.commands.edits.edit import AblateCommand
from circuits.cli.commands.pictures.features import FeaturesCommand
from circuits.cli.commands.pictures.render import ExploreCommand, RenderCommand
from circuits.cli.commands.pictures.report import ReportCommand
from circuits.cli.commands.tests.faithfulness import FaithfulnessCommand
from circuits.cli.commands.tests.validate import ValidateCommand
from circuits.cli.options import Common, Output, Overwrites
from circuits.cli.streams import printable, say
from circuits.options import DiscoverOptions, FaithfulnessOptions, ValidityOptions
from sae._options import FeatureCount, TokenCount
from sae._run.locks import lock
from sae.errors import UserError
from sae.features.options import FeaturePageOptions
from sae.training.config import TrainConfig

BEHAVIOURS = {
    "simple": "Subject-verb agreement",
    "nounpp": "Subject-verb agreement across a prepositional phrase",
    "rc": "Subject-verb agreement across a relative clause",
    "within_rc": "Subject-verb agreement within a relative clause",
}
VERIFIED = 20
"""Nodes that are patched exactly."""
PAGES = 50
"""Strongest features that get a page."""
PAGE_OPTIONS = FeaturePageOptions(tokens=8_000, correlation_tokens=8_000, samples=2)
START_SITE = "attn_1"
"""Faithfulness is measured from here on: what happens in block 0 is given, as the paper gives its first layers."""


@dataclass(frozen=True, kw_only=True)
class DemoCommand(Common, Overwrites):
    """Find, test, draw and edit a circuit for subject-verb agreement in the bundled model."""

    out: Path = Path("runs/demo")
    """Run folder that receives everything."""
    behaviour: Literal["simple", "nounpp", "rc", "within_rc"] = "nounpp"
    """Agreement across what: simple (nothing), nounpp (a prepositional phrase), rc and within_rc (relative clauses)."""
    tokens: TokenCount = 400_000
    """Tokens the autoencoders are trained on."""
    features: FeatureCount = 256
    """Features of each autoencoder."""
    k: FeatureCount = 8
    """Active features a token."""

    def run(self) -> Output:
        from sae.training.run_folder import check_run_folder

        with lock(self.out):
            check_run_folder(self.out, "train", resume=False, overwrite=self.overwrite)
            story = _Story(self)
            story.tell()
        return Output(story.summary(), story.data)


def bundled(*names: str) -> str:
    """Path of a file of the agreement example: `circuits/bundled` in an installed package, else in the clone."""
    package = Path(str(importlib.resources.files("circuits")))
    for folder in (package / "bundled", package.parent / "examples" / "agreement"):
        if folder.joinpath(*names).exists():
            return str(folder.joinpath(*names))
    raise UserError(f"the bundled example lacks {'/'.join(names)}: install the package again")


class _Story:
    """The demo's chapters, each a command that anyone could type."""

    def __init__(self, options: DemoCommand) -> None:
        self.options = options
        self.out = options.out
        self.model = bundled("model")
        self.train_prompts = bundled("prompts", options.behaviour, "train.jsonl")
        self.test_prompts = bundled("prompts", options.behaviour, "test.jsonl")
        self.valid = bundled("text", "valid.txt")
        self.common: dict[str, Any] = {
            name: getattr(options, name) for name in ("device", "device_map", "quantize", "remote", "dtype", "json")
        }
        self.data: dict[str, Any] = {}
        self.started = time.monotonic()

    def tell(self) -> None:
        """Run every chapter; what each finds goes to `data`."""
        out = self.out
        circuit: dict[str, Any] = {"circuit": out, **self.common}
        config = TrainConfig(features=self.options.features, k=self.options.k, tokens=self.options.tokens)
        text = bundled("text", "train.txt")
        self._chapter(
            "train",
            f"An autoencoder of {self.options.features} features at every site of the bundled model",
            TrainCommand(model=self.model, text=text, out=out, config=config, overwrite=True, **self.common),
        )
        self._chapter(
            "evaluate",
            "How well they reconstruct the model, on text they have not seen",
            EvaluateCommand(model=self.model, saes=str(out), text=self.valid, tokens=8_000, **self.common),
        )
        self._chapter(
            "discover",
            f"Which features make the verb agree with its subject ({self.options.behaviour})",
            DiscoverCommand(
                model=self.model, saes=str(out), prompts=self.train_prompts, out=out, text=self.valid, overwrite=True,
                options=DiscoverOptions(aggregation="spans"), verify=VERIFIED,
                title=BEHAVIOURS[self.options.behaviour], **self.common,
            ),
        )  # fmt: skip
        self._chapter(
            "faithfulness",
            f"How much of the behaviour it explains from {START_SITE} on, tested with other nouns and verbs",
            FaithfulnessCommand(
                prompts=self.test_prompts, options=FaithfulnessOptions(start_site=START_SITE), **circuit
            ),
        )
        self._chapter(
            "validate",
            "How far to trust it: other samples, families of prompts, backups, single prompts, exact patching",
            ValidateCommand(prompts=self.test_prompts, options=ValidityOptions(start_site=START_SITE), **circuit),
        )
        self._chapter(
            "attention",
            "Why attention looks there: the heads behind its edges, and the features behind the scores of these heads",
            AttentionCommand(prompts=self.test_prompts, examples=100, **circuit),
        )
        self._chapter(
            "ablate",
            "What becomes of the model when a few of them, chosen to cost little elsewhere, stay at their mean",
            AblateCommand(
                prompts=self.test_prompts, choose="surgical", text=self.valid, generate=2, new_tokens=8, random=3,
                **circuit,
            ),
        )  # fmt: skip
        self._show(circuit)

    def _show(self, circuit: dict[str, Any]) -> None:
        """The chapters that draw and describe the circuit."""
        out = self.out
        self._chapter(
            "features",
            "Its strongest features on pages of their own, with what becomes of each token without them",
            FeaturesCommand(
                text=self.valid,
                top=100,
                options=FeaturePageOptions(tokens=8_000, correlation_tokens=8_000, samples=2),
                **circuit,
            ),
        )
        drawing: dict[str, Any] = {"circuit": out, "json": self.options.json}
        self._chapter(
            "draw",
            "The circuit as a drawing, as a page to explore, and the report",
            RenderCommand(**drawing),
            RenderCommand(out=out / "graph" / "circuit.png", **drawing),
            ExploreCommand(**drawing),
            ReportCommand(**drawing),
        )

    def _chapter(self, name: str, title: str, *commands: Any) -> None:
        if not self.options.json:
            say(f"\n\033[1m{title}\033[0m\n" if sys.stdout.isatty() else f"\n{title}\n")
        for command in commands:
            output = command.run()
            self.data.setdefault(name, {}).update(output.data)
            if not self.options.json:
                say(printable(output.text) + "\n")

    def summary(self) -> str:
        """The findings in five lines."""
        discovery, curve, edit = (self.data[name] for name in ("discover", "faithfulness", "ablate"))
        half = next(((n, f) for n, f in zip(curve["sizes"], curve["faithfulness"], strict=True) if f >= 0.5), None)
        before, after = edit["before"]["overall"], edit["after"]["overall"]
        drawn = edit["random_remaining"]
        minutes = (time.monotonic() - self.started) / 60
        lines = [
            f"\nIn {minutes:.1f} minutes: a circuit of {discovery['kept']['nodes']} nodes and "
            f"{discovery['kept']['edges']} edges, out of {discovery['n_nodes']} nodes with any effect.",
            f"  {half[0]} nodes from {curve['start_site']} on explain {half[1]:.0%} of the behaviour by themselves."
            if half
            else "  No size that was measured explains half of the behaviour by itself.",
            f"  With {len(edit['features'])} chosen features at their mean {_left(edit)}",
            f"  and accuracy goes from {before['accuracy']:.0%} to {after['accuracy']:.0%}; other text costs "
            f"{edit['ce_elsewhere_increase']:+.3f} nats elsewhere;",
            f"  with as many random features of the same sites at theirs {_mean(drawn)} is left.",
            f"  Open {self.out / 'report.html'} and {self.out / 'graph' / 'circuit.html'}.",
        ]
        return "\n".join(lines)


def _mean(shares: list[float | None]) -> str:
    defined = [share for share in shares if share is not None]
    return f"{sum(defined) / len(defined):.0%}" if defined else "-"


def _left(edit: dict[str, Any]) -> str:
    """The share of the logit difference that an edit leaves, by case."""
    by_case = ", ".join(f"{left:.0%} ({case})" for case, left in edit["remaining_by_case"].items() if left is not None)
    turned = f" (reversed in {', '.join(edit['reversed_cases'])})" if edit["reversed_cases"] else ""
    return f"the logit difference is {by_case or format(edit['remaining'], '.0%')} of what it was{turned}"
