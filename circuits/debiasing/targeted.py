"""Targeted probe perturbation (TPP; Karvonen et al. 2025, SAEBench): SHIFT's question for several classes at once.

1. For each class a probe tells its texts from as many others, at one site.
2. The n features of a class are those with the largest |mean difference of activation x (probe . W_dec)|; `by_push`
   takes SAEBench's, which are more active on the class and push its probe up.
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

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch
from torch import Tensor

from circuits.debiasing.data import Labelled, Source, held_out_rows, read_labelled, text_set
from circuits.debiasing.options import PerturbationOptions
from circuits.debiasing.probing import Pooled, SAEs, probe_site, read_features
from circuits.debiasing.results import PerturbationReport
from circuits.metrics.fit_probe import FittedProbe, fit_probe
from circuits.prompts.alignment import numbered
from circuits.uncertainty.bootstrap import Bootstrap, group_sums
from sae._options import parse_sizes
from sae.errors import UserError, unknown
from sae.model.language_model import LanguageModel
from sae.model.sites import Site
from sae.splice import ensure_checked


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
    for one, (texts, what) in product(classes, zip(sets, ("learn from", "test on"), strict=True)):
        if one not in texts.intended:
            raise UserError(f"there is no text of class {one!r} to {what}: give more texts of it, or leave it out")
    learned, tested = (
        Perturbed(read_features(model, saes, texts, site, options.position), texts.intended, texts.prompts.texts)
        for texts in sets
    )
    return perturb(learned, tested, saes[site].W_dec.float().cpu(), site, options)


@dataclass(frozen=True)
class Perturbed:
    """Texts as probes of several classes read them."""

    read: Pooled
    """Activations and features."""
    labels: Sequence[str]
    """The class of each."""
    texts: Sequence[str] = ()
    """The texts themselves; all different by default."""


def perturb(
    train: Perturbed, test: Perturbed, W_dec: Tensor, site: Site, options: PerturbationOptions
) -> PerturbationReport:
    """Train a probe a class, ablate the features of each in turn, and test them all.

    W_dec: [F, d] decoder rows of the site's autoencoder.
    """
    classes, sizes = sorted(set(train.labels)), parse_sizes(options.sizes)
    probes, orders = [], []
    for one in classes:
        rows, labels = against_others(train.labels, one, options.seed)
        probe = fit_probe(train.read.x[rows], labels, penalty=options.penalty, seed=options.seed)
        is_one = torch.tensor([label == one for label in labels])
        rank = by_push if options.rank == "positive" else by_share
        orders.append(rank(train.read.f[rows], is_one, W_dec @ probe.weight * (1 if probe.classes[1] == one else -1)))
        probes.append(probe)
    tests = [against_others(test.labels, one, options.seed) for one in classes]
    moved = test.read.f - (train.read.f.mean(0) if options.operation == "mean" else 0)  # [B, F] what ablation takes

    def right(ablated: Tensor) -> list[Tensor]:
        return [_right(*pair, test.read.x, moved, W_dec, ablated) for pair in zip(probes, tests, strict=True)]

    plain = right(torch.zeros(0, dtype=torch.int64))
    lost = [[[a - b for a, b in zip(plain, right(order[:n]), strict=True)] for order in orders] for n in sizes]
    rows_of, texts = [torch.tensor(rows) for rows, _ in tests], numbered(test.texts or range(len(test.labels)))
    return PerturbationReport(
        site.name, options.position, classes, list(sizes), [one.mean().item() for one in plain],
        [[[one.mean().item() for one in of_probe] for of_probe in of_size] for of_size in lost],
        [[f"{site}/{feature}" for feature in order[: max(sizes)].tolist()] for order in orders],
        len(train.labels), len(test.labels),
        [_interval(of_size, rows_of, texts, options.seed) for of_size in lost],
    )  # fmt: skip


def _interval(
    lost: Sequence[Sequence[Tensor]], rows: Sequence[Tensor], texts: Tensor, seed: int
) -> tuple[float, float]:
    """95 % interval of TPP over test texts: TPP is the mean of one number a text, its share in all the drops.

    lost: [class ablated][class of the probe] loss of each test text, [n]; rows: the texts of each probe; texts: [B]
    which text each is, so that one that is repeated is drawn once.
    """
    n = len(lost)
    share = torch.zeros(len(texts), dtype=torch.float64)
    for target, of_probe in enumerate(lost):
        for probe, values in enumerate(of_probe):
            weight = 1 / n if target == probe else -1 / (n * (n - 1))
            share.index_add_(0, rows[probe], weight * values.double() / len(values))
    sums, sizes = (
        group_sums(share[:, None], texts),
        group_sums(torch.full((len(texts),), 1 / len(texts)).double(), texts),
    )
    low, high = Bootstrap(seed=seed).intervals(sums, sizes)[0].tolist()
    return low, high


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


def by_push(f: Tensor, is_one: Tensor, output: Tensor) -> Tensor:
    """[n] features that push a probe towards a class, most first, as SAEBench takes them: those more active on the
    class, by (mean f on it − mean f elsewhere) · (W_dec · probe), as far as that is above zero; see `by_share`.

    output: what a unit of each feature adds towards the class.
    """
    push = (f[is_one].mean(0) - f[~is_one].mean(0)).clamp(min=0) * output
    return push.argsort(descending=True)[: int((push > 0).sum())]


Rows = tuple[list[int], list[str]]
"""Numbers of texts, and for each the class or that it is another."""


def _divided(data: Source, test: Source | None, options: PerturbationOptions) -> tuple[list[Labelled], list[Labelled]]:
    """Texts to learn on and to test on, of the chosen classes, at most so many of each; `test_share` of each class."""
    names = {name.strip() for name in options.classes.split(",")} if options.classes else None

    def chosen(source: Source) -> list[Labelled]:
        texts = read_labelled(source, intended=options.intended, spurious=None)
        texts = [text for text in texts if names is None or text.intended in names]
        seen: Counter[str] = Counter()
        first = []
        for text in texts:
            if options.examples is None or seen[text.intended] < options.examples:
                first.append(text)
            seen[text.intended] += 1
        return first

    texts = chosen(data)
    if test is not None:
        return texts, chosen(test)
    generator = torch.Generator().manual_seed(options.seed)
    tested = held_out_rows(texts, [text.intended for text in texts], options.test_share, generator, least=1)
    return ([text for row, text in enumerate(texts) if row not in tested],
            [text for row, text in enumerate(texts) if row in tested])  # fmt: skip


def against_others(labels: Sequence[str], one: str, seed: int) -> Rows:
    """The texts of a class and as many of all others, drawn at random."""
    of_class = [row for row, label in enumerate(labels) if label == one]
    rest = [row for row, label in enumerate(labels) if label != one]
    order = torch.randperm(len(rest), generator=torch.Generator().manual_seed(seed)).tolist()
    n = min(len(of_class), len(rest))
    return of_class[:n] + [rest[number] for number in order[:n]], [one] * n + [f"not {one}"] * n


def _right(probe: FittedProbe, rows: Rows, x: Tensor, moved: Tensor, W_dec: Tensor, ablated: Tensor) -> Tensor:
    """Whether a probe is right on test texts, [n] 1 or 0, with `moved` [B, F] taken away from some features."""
    numbers, labels = rows
    lost = moved[numbers][:, ablated] @ (W_dec[ablated] @ probe.weight)  # [n]
    output = x[numbers] @ probe.weight + probe.bias - lost
    return ((output > 0) == torch.tensor([label == probe.classes[1] for label in labels])).float()
