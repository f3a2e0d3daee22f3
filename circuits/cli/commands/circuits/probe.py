"""`sfc probe`: learn a linear probe from labelled prompts, to be the metric of a circuit."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from circuits.cli.options import Common, HasModel, Output, Overwrites
from circuits.cli.results import output_file
from sae._options import MANY, LearningRate, Range, Seed
from sae.errors import UserError, unknown

if TYPE_CHECKING:
    from torch import Tensor

    from circuits.prompts.formats import Example
    from sae.model.language_model import LanguageModel, Tokens

LAST = "last"
"""The position that is read where no span is named."""
TEXT_KEYS = ("text", "clean_prefix", "clean", "prompt")


@dataclass(frozen=True, kw_only=True)
class ProbeCommand(Common, Overwrites, HasModel):
    """Learn a linear probe at a site from labelled prompts. Its logit is a metric: sfc discover --metric probe:FILE."""

    prompts: str
    """JSON lines or CSV with a text (text, or clean_prefix) and a label."""
    site: str
    """Where the probe reads, such as resid_2."""
    out: Path
    """File to write, .safetensors."""
    label: str | None = None
    """Key of the label; label or case by default."""
    positive: str | None = None
    """Pattern of labels, such as "plural*", that the probe tells from all others; all labels are classes by default."""
    position: str = LAST
    """Token that is read: last, or the name of a span, over which activations are averaged."""
    span_template: str | None = None
    """Template that finds the spans, such as "The {subject} near the {attractor}"; otherwise the prompts' own."""
    examples: Annotated[int, Range(2, MANY)] | None = None
    """At most this many of the prompts: the first, or some of each label where these miss one; all by default."""
    held_out: Annotated[float, Range(0, 0.99, above=True)] = 0.25
    """Share of the prompts on which the probe is scored and not learned."""
    penalty: LearningRate = 1.0
    """Inverse strength of the L2 penalty."""
    seed: Seed = 0
    """Seed of the division."""

    def run(self) -> Output:
        from circuits.metrics.probe import is_probe

        with output_file(self.out, is_probe, overwrite=self.overwrite):
            return self._run()

    def _run(self) -> Output:
        from circuits.cli.common import load_model
        from circuits.metrics.fit_probe import fit_probe, read_site
        from circuits.metrics.probe import save_probe

        texts, labels = self._labelled()
        model = load_model(self.model, self)
        names = {site.name: site for site in model.sites}
        if self.site not in names:
            raise unknown("site", self.site, names)
        site = names[self.site]
        tokens = model.tokenize_prompts([example.clean for example in texts])
        inside, with_span = None, list(range(len(texts)))
        if self.position != LAST:
            inside, with_span = self._inside(texts, model, tokens)
        x = read_site(model, tokens[with_span], site, None if inside is None else inside[with_span])
        fitted = fit_probe(
            x, [labels[row] for row in with_span], held_out=self.held_out, penalty=self.penalty, seed=self.seed
        )
        save_probe(
            self.out,
            fitted.weight,
            fitted.bias,
            site=site,
            position=self.position,
            classes=fitted.classes,
            model=model,
            overwrite=self.overwrite,
        )
        data = {
            "out": str(self.out), "site": site.name, "position": self.position, "classes": fitted.classes,
            "accuracy": fitted.accuracy, "chance": fitted.chance, "n_train": fitted.n_train, "n_test": fitted.n_test,
            "without_span": len(texts) - len(with_span),
        }  # fmt: skip
        left_out = f"; {data['without_span']} prompts without the span left out" if data["without_span"] else ""
        text = (
            f"probe at {site}, {self.position}: {fitted.accuracy:.1%} of {fitted.n_test} held-out prompts right "
            f"(commonest label {fitted.chance:.1%}), learned on {fitted.n_train}{left_out}\n"
            f"classes: {', '.join(fitted.classes)}\nwrote {self.out}"
        )
        return Output(text, data)

    def _labelled(self) -> tuple[list[Example], list[str]]:
        """Texts and labels of the file."""
        from circuits.prompts.formats import read_rows
        from circuits.prompts.reader import first_rows

        texts, labels = [], []
        for row, example, where in read_rows(self.prompts, TEXT_KEYS):
            keys = [self.label] if self.label else ["label", "case"]
            label = next((str(row[key]) for key in keys if row.get(key) not in (None, "")), None)
            if label is None:
                raise UserError(f"{where}: no {' or '.join(keys)} (found {sorted(row)}): say which key with --label")
            if self.positive is not None:
                label = "positive" if fnmatch(label, self.positive) else "negative"
            texts.append(example)
            labels.append(label)
        rows = first_rows(labels, len(labels) if self.examples is None else self.examples)
        return [texts[row] for row in rows], [labels[row] for row in rows]

    def _inside(self, texts: list[Example], model: LanguageModel, tokens: Tokens) -> tuple[Tensor, list[int]]:
        """[B, S] bool, the tokens of the span; and the prompts that have it."""
        import torch

        from circuits.prompts.reader import find_spans

        names = find_spans(texts, model, self.span_template)
        width = tokens.n_positions
        rows = [[False] * width if isinstance(row, str) else _flags(row, self.position, width) for row in names]
        with_span = [number for number, row in enumerate(rows) if any(row)]
        if not with_span:
            reasons = sorted({row for row in names if isinstance(row, str)}) or ["it is not among the spans"]
            raise UserError(f"no prompt has the span {self.position!r}: {'; '.join(reasons)}")
        return torch.tensor(rows, device=model.device), with_span


def _flags(row: list[str], name: str, width: int) -> list[bool]:
    return [False] * (width - len(row)) + [span == name for span in row]
