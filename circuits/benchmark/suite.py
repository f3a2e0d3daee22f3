"""The suite of tasks: everything that can be said of dictionaries without a language model as a judge.

1. Labelled texts (`circuits.benchmark.data`) go through the model once a site, and leave the mean of activations and
   features over the tokens read.
2. Each data set gives sparse probing; with two labels spurious correlation removal; with three classes or more targeted
   probe perturbation.
3. The vocabulary gives feature absorption, where the model tells first letters apart.
4. Other trainings at the same sites give the stability of features.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor

from circuits.benchmark.absorption import Inapplicable, absorption, first_letter_words, read_words
from circuits.benchmark.data import DataSet, read_data_sets
from circuits.benchmark.options import SuiteOptions
from circuits.benchmark.results import Perturbation, SuiteReport
from circuits.benchmark.sparse_probing import sparse_probing
from circuits.benchmark.spurious import spurious_removal
from circuits.debiasing.data import TextSet, text_set
from circuits.debiasing.options import PerturbationOptions
from circuits.debiasing.probing import Pooled, SAEs, read_features
from circuits.debiasing.targeted import Perturbed, perturb
from sae._options import parse_sizes
from sae.data.batches import context_of
from sae.errors import UserError
from sae.model.language_model import LanguageModel
from sae.model.sites import Site, select_sites
from sae.splice import ensure_checked

ABSORPTION = "absorption"


def evaluate_suite(
    model: LanguageModel,
    saes: SAEs,
    data: str,
    options: SuiteOptions | None = None,
    *,
    context: int | None = None,
    progress: Callable[[str], None] | None = None,
    **changes: Any,
) -> SuiteReport:
    """Measure dictionaries on tasks, as SAEBench does (Karvonen et al. 2025, arXiv 2503.09532).

    Args:
        model: The model.
        saes: Its dictionaries by site.
        data: Labelled texts: a file, a folder of files, `sae-probes` or `sae-probes:TAG,TAG`, a folder of that
            package's data, or a data set of the hub.
        options: Which texts are read, where, and how many features a task may use.
        context: Tokens after which a text is cut; 128 by default, less if the model takes less.
        progress: Called with the name of each data set and site before it is read.
        changes: Single fields of `SuiteOptions`.

    Returns:
        Scores by task, data set, site and number of features, with 95 % intervals over texts or words.

    Raises:
        UserError: For a source without labelled texts, or a site without a dictionary.
    """
    options = replace(options or SuiteOptions(), **changes)
    sites = select_sites(options.suite_sites, list(saes))
    ensure_checked(model, saes, sites)
    say = progress or (lambda _: None)
    report = SuiteReport(options.position)
    for name, data_set in read_data_sets(data, options):
        if isinstance(data_set, str):
            report.left_out[name] = data_set
        else:
            _data_set(model, saes, sites, data_set, options, context_of(model, context), report, say)
    if not report.texts:
        reasons = "; ".join(f"{name}: {why}" for name, why in list(report.left_out.items())[:3])
        raise UserError(f"{data!r} holds no data set to probe: {reasons or 'nothing in it is one'}")
    _absorption(model, saes, sites, options, report, say)
    return report


def _data_set(
    model: LanguageModel, saes: SAEs, sites: list[Site], data: DataSet, options: SuiteOptions, context: int,
    report: SuiteReport, say: Callable[[str], None],
) -> None:  # fmt: skip
    """Add the tasks of one data set to the report."""
    try:
        train, test = (text_set(texts, model, options.position, name=f"of {data.name}", context=context)
                       for texts in (data.train, data.test))  # fmt: skip
    except UserError as error:
        report.left_out[data.name] = str(error)
        return
    if len(set(train.intended)) < 2 or set(train.intended) != set(test.intended):
        report.left_out[data.name] = "too few of its texts can be read by the model"
        return
    report.texts[data.name] = (len(train), len(test))
    for site in sites:
        say(f"{data.name} at {site}")
        read, held_out = (read_features(model, saes, texts, site, options.position) for texts in (train, test))
        report.probing.extend(
            sparse_probing(
                data.name, site.name, read, train.intended, held_out, test.intended,
                sizes=parse_sizes(options.probe_sizes, "probe-sizes"), penalty=options.penalty, seed=options.seed,
                test_texts=test.prompts.texts,
            )
        )  # fmt: skip
        W_dec = saes[site].W_dec.float().cpu()
        sizes = [n for n in parse_sizes(options.ablation_sizes, "ablation-sizes") if n <= len(W_dec)]
        if sizes and has_four_groups(train) and has_four_groups(test):
            report.removal.extend(
                spurious_removal(
                    data.name, site.name, read, train.labelled, held_out, test.labelled, W_dec,
                    sizes=sizes, penalty=options.penalty, seed=options.seed, operation=options.operation,
                )
            )  # fmt: skip
        if sizes and len(set(train.intended)) > 2:
            pairs = (read, train), (held_out, test)
            report.perturbation.extend(_perturbation(data.name, site, pairs, W_dec, sizes, options))


def has_four_groups(texts: TextSet) -> bool:
    """Whether both labels have two values each, in all four combinations."""
    pairs = set(zip(texts.intended, texts.spurious, strict=True))
    return "" not in texts.spurious and len(set(texts.intended)) == len(set(texts.spurious)) == 2 and len(pairs) == 4


def _perturbation(
    name: str, site: Site, halves: tuple[tuple[Pooled, TextSet], tuple[Pooled, TextSet]], W_dec: Tensor,
    sizes: list[int], options: SuiteOptions,
) -> list[Perturbation]:  # fmt: skip
    """TPP as SAEBench has it, by number of features."""
    train, test = (Perturbed(read, texts.intended, texts.prompts.texts) for read, texts in halves)
    how = PerturbationOptions(
        sizes=",".join(map(str, sizes)), rank="positive", position=options.position, penalty=options.penalty,
        seed=options.seed, operation=options.operation,
    )  # fmt: skip
    result = perturb(train, test, W_dec, site, how)
    return [
        Perturbation(name, site.name, n, result.score(n), bounds, result.on_target(n), result.off_target(n))
        for n, bounds in zip(result.sizes, result.intervals, strict=True)
    ]


def _absorption(
    model: LanguageModel, saes: SAEs, sites: list[Site], options: SuiteOptions, report: SuiteReport,
    say: Callable[[str], None],
) -> None:  # fmt: skip
    """Add absorption to the report, or why there is none."""
    try:
        words = first_letter_words(model, options)
    except Inapplicable as reason:
        report.left_out[ABSORPTION] = str(reason)
        return
    reasons: Counter[str] = Counter()
    for site in sites:
        say(f"first letters at {site}")
        try:
            read = read_words(model, saes[site], site, words)
            report.absorption.append(absorption(site, words, read, saes[site].W_dec.float().cpu(), options))
        except Inapplicable as reason:
            reasons[str(reason)] += 1
    if reasons:
        more = f", and likewise at {len(reasons) - 1} other sites" if len(reasons) > 1 else ""
        report.left_out[ABSORPTION] = f"{next(iter(reasons))}{more}"
