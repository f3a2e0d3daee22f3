"""Targeted probe perturbation (TPP; Karvonen et al. 2025, SAEBench): SHIFT's question for several classes at once.

1. For each class a probe tells its texts from as many others, at one site.
2. The n features of a class are those with the largest |mean difference of activation x (probe . W_dec)|.
3. They are set to zero (or to their mean) at that site, the error of the autoencoder stays, and all probes are tested:

       TPP(n) = mean over classes i of [drop of probe i when i's features go]
              - mean over i != j of     [drop of probe j when i's features go]

   with accuracies on as many test texts of the class as of others. 1/2 is the most there can be, for features that are
   of their class alone; 0 says that they are of no class in particular.

Everything behind the site is a linear read-out, so that no pass is run again: taking feature f of a text from its mean
activation over the tokens that are read, a_f, to c changes the probe's output by (c - a_f) (probe . W_dec[f]).

Shapes: B texts, d model width, F features, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from circuits.debiasing.data import Labelled, Source, TextSet, read_labelled, span_read, text_set
from circuits.debiasing.options import LAST, PerturbationOptions
from circuits.debiasing.probing import SAEs, probe_site
from circuits.debiasing.results import PerturbationReport
from circuits.editing.targets import tokens_at
from circuits.metrics.fit_probe import FittedProbe, fit_probe
from circuits.prompts.reader import first_rows
from sae._options import parse_sizes
from sae.errors import UserError, unknown
from sae.model.language_model import LanguageModel
from sae.splice import ensure_checked

BATCH = 64


def targeted_perturbation(
    model: LanguageModel,
    saes: SAEs,
    data: Source,
    test: Source | None = None,
    options: PerturbationOptions | None = None,
    **changes: Any,
) -> PerturbationReport:
    """How far the features that a probe of one class rests on are of that class alone.

    Args:
        model: The model.
        saes: SAEs, of which that of the probe's site is used.
        data: Texts with a label of three or more classes, as for `shift`.
        test: Other texts with the label; a share of `data` by default.
        options: Key of the label, where the probes read, and how many features are ablated.
        changes: Single fields of `PerturbationOptions`.

    Returns:
        Losses of accuracy on and off target by number of features, and TPP, their difference.

    Raises:
        UserError: For texts without the label, fewer than three classes, or a site without an SAE.
    """
    options = replace(options or PerturbationOptions(), **changes)
    site = probe_site(model, options.site)
    if site not in saes:
        raise unknown("site of an autoencoder", site.name, [one.name for one in saes])
    ensure_checked(model, saes, [site])
    train, held_out = _divided(data, test, options)
    classes = sorted({text.intended for text in train})
    if len(classes) < 3 or any(text.intended not in classes for text in held_out):
        shown = ", ".join(classes[:8])
        raise UserError(f"targeted perturbation needs three classes or more, and no others to test on: found {shown}")
    sets = [text_set(rows, model, options.position, name="with labels") for rows in (train, held_out)]
    (x, f), (test_x, test_f) = (_read(model, saes, texts, site, options.position) for texts in sets)
    sizes = parse_sizes(options.sizes)
    W_dec = saes[site].W_dec.float().cpu()
    probes, orders = [], []
    for one in classes:
        rows, labels = _against_others(sets[0].intended, one, options.seed)
        probe = fit_probe(x[rows], labels, penalty=options.penalty, seed=options.seed)
        orders.append(by_share(f[rows], torch.tensor([label == one for label in labels]), W_dec @ probe.weight))
        probes.append(probe)
    tests = [_against_others(sets[1].intended, one, options.seed) for one in classes]

    moved = test_f - (f.mean(0) if options.operation == "mean" else 0)  # [B, F] what ablation takes away

    def accuracies(ablated: Tensor) -> list[float]:
        return [_accuracy(*pair, test_x, moved, W_dec, ablated) for pair in zip(probes, tests, strict=True)]

    plain = accuracies(torch.zeros(0, dtype=torch.int64))
    drops = [
        [[a - b for a, b in zip(plain, accuracies(order[:size]), strict=True)] for order in orders] for size in sizes
    ]
    names = [[f"{site}/{feature}" for feature in order[: max(sizes)].tolist()] for order in orders]
    return PerturbationReport(
        site.name, options.position, classes, list(sizes), plain, drops, names, len(sets[0]), len(sets[1])
    )


def by_share(f: Tensor, is_one: Tensor, output: Tensor) -> Tensor:
    """[F] features by what they give of the difference that a probe sees between a class and the others, most first:
    |mean f on the class − mean f elsewhere| · |W_dec · probe|.

    Args:
        f: activations [B, F].
        is_one: whether each text is of the class, [B] bool.
        output: what a unit of each feature adds to the probe's output, W_dec · probe [F].
    """
    difference = f[is_one].mean(0) - f[~is_one].mean(0)
    return (difference * output).abs().argsort(descending=True)


Rows = tuple[list[int], list[str]]
"""Numbers of texts, and for each the class or that it is another."""


def _divided(data: Source, test: Source | None, options: PerturbationOptions) -> tuple[list[Labelled], list[Labelled]]:
    """Texts to learn on and to test on, of the chosen classes, at most so many of each."""
    names = {name.strip() for name in options.classes.split(",")} if options.classes else None

    def chosen(source: Source) -> list[Labelled]:
        texts = read_labelled(source, intended=options.intended, spurious=None)
        texts = [text for text in texts if names is None or text.intended in names]
        labels = [text.intended for text in texts]
        n = len(texts) if options.examples is None else options.examples * len(set(labels))
        return [texts[row] for row in first_rows(labels, n)]

    texts = chosen(data)
    if test is not None:
        return texts, chosen(test)
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(options.seed)).tolist()
    n_test = round(options.test_share * len(texts))
    return [texts[row] for row in order[n_test:]], [texts[row] for row in order[:n_test]]


def _against_others(labels: Sequence[str], one: str, seed: int) -> Rows:
    """The texts of a class and as many of all others, drawn at random."""
    own = [row for row, label in enumerate(labels) if label == one]
    rest = [row for row, label in enumerate(labels) if label != one]
    order = torch.randperm(len(rest), generator=torch.Generator().manual_seed(seed)).tolist()
    n = min(len(own), len(rest))
    return own[:n] + [rest[number] for number in order[:n]], [one] * n + [f"not {one}"] * n


@torch.no_grad()
def _read(model: LanguageModel, saes: SAEs, texts: TextSet, site: Any, position: str) -> tuple[Tensor, Tensor]:
    """Mean activation of the site [B, d] and of its features [B, F] over the tokens that are read."""
    xs, fs = [], []
    for batch in texts.prompts.batches(BATCH):
        read = saes[site].config.read_site(site)
        run = model.run(batch.clean, capture={site, read}, need_logits=False)
        x = run.activations[site].float()
        inside = torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device)
        if position == LAST:
            inside[:, -1] = True
        else:
            inside = tokens_at(batch, span_read(position))
        rows = torch.arange(len(x), device=x.device)[:, None].expand_as(inside)[inside]  # [n] text of each token
        share = 1 / inside.sum(1).float()[rows][:, None]
        xs.append(torch.zeros(len(x), x.shape[-1], device=x.device).index_add_(0, rows, x[inside] * share))
        f = saes[site].encode(run.activations[read][inside].float()).float()
        fs.append(torch.zeros(len(x), f.shape[-1], device=x.device).index_add_(0, rows, f * share))
    return torch.cat(xs).cpu(), torch.cat(fs).cpu()


def _accuracy(probe: FittedProbe, rows: Rows, x: Tensor, moved: Tensor, W_dec: Tensor, ablated: Tensor) -> float:
    """Accuracy of a probe on test texts, with `moved` [B, F] taken away from some features."""
    numbers, labels = rows
    lost = moved[numbers][:, ablated] @ (W_dec[ablated] @ probe.weight)  # [n]
    output = x[numbers] @ probe.weight + probe.bias - lost
    answers = [probe.classes[int(is_second)] for is_second in (output > 0).tolist()]
    return sum(a == b for a, b in zip(answers, labels, strict=True)) / len(labels)
