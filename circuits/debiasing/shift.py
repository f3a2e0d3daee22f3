"""SHIFT: spurious human-interpretable feature trimming (Marks et al. 2024, section 4).

1. Train a probe on ambiguous texts, in which an intended label always comes with one spurious label.
2. Find the circuit of the probe's output on them; without contrasting texts a node's effect is that of zeroing it.
3. A judge looks at the features that matter and says which of them a probe of the intended label should not use.
4. Ablate those in the model, and train the probe again on the ambiguous texts if you like.
5. Test on texts in which the labels come in all four combinations, beside:

   | | looks at balanced texts | |
   |---|---|---|
   | random features | no | as many, active on the texts, at the same sites and spans |
   | embedding features | no | what the same judge drops of the embedding alone, everywhere |
   | concept bottleneck | no | a probe of the kept features' activations |
   | feature skyline, neuron skyline | yes | those with the largest effect towards the spurious label |
   | oracle | yes | a probe trained on them |

   Where embedding features do as well, the spurious label could be read off single words, and the circuit was not
   needed (see the critique of Bias in Bios, https://www.lesswrong.com/posts/QdxwGz9AeDu5du4Rk).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from circuits.attribution.nodes import SiteNodes, ranked
from circuits.circuit import Circuit
from circuits.debiasing import results
from circuits.debiasing.data import (
    Labelled,
    Pairing,
    Source,
    TextSet,
    divided,
    equal_groups,
    read_labelled,
    text_set,
    usable,
)
from circuits.debiasing.describe import activations, described
from circuits.debiasing.judges import Judge, judge_name, judged
from circuits.debiasing.options import REST, ShiftOptions
from circuits.debiasing.probing import SAEs, Study, probe_site
from circuits.debiasing.results import JudgedFeature, ProbeScore, ShiftReport
from circuits.editing.declaration import Edit
from circuits.editing.random_features import active_features, random_features
from circuits.editing.targets import feature_names
from sae.errors import UserError
from sae.model.language_model import LanguageModel
from sae.model.sites import Site
from sae.neurons import neuron_dictionaries

EMBED = "embed"


def shift(
    model: LanguageModel,
    saes: SAEs,
    data: Source,
    test: Source | None = None,
    options: ShiftOptions | None = None,
    *,
    concept: Source | None = None,
    judge: Judge | None = None,
    labels: Mapping[str, str] | None = None,
    progress: bool = True,
    **changes: Any,
) -> ShiftReport:
    """Take from a probe the features that it should not use, and measure how that serves it.

    Args:
        model: The model that the probe reads.
        saes: SAEs at the sites of the circuit.
        data: Texts with an intended and a spurious label: a file, `FOLDER:split`, a hub data set `owner/name:split`, or
            rows `{"text", "intended", "spurious"}`. Those whose labels go together are the ambiguous texts the probe is
            trained on; all groups together, as many of each, are the balanced texts of skylines and oracle.
        test: Other texts with both labels, of all four groups; a share of `data` by default.
        options: Keys of the labels, where the probe reads, how its circuit is found and who judges.
        concept: Texts with the spurious label, of which no other label is read: the judge is then the correlation with
            it, as with `concept_data` of the options.
        judge: A function of the features (`JudgedFeature`) that says for each whether it is to be ablated, in place of
            the judges of the options.
        labels: What features are called, `{"resid_3/120": "female names"}`, for judges to read.
        progress: Whether progress bars are shown.
        changes: Single fields of `ShiftOptions`, such as `site="resid_2"`, `keywords="female"`.

    Returns:
        The probe's accuracy on both labels and in each group, before and after, beside the baselines; without a judge
        nothing is ablated, and the report lists the features to judge.

    Raises:
        UserError: For texts without these labels, a site, span or class that is not there, and a judge that fails.
    """
    options = replace(options or ShiftOptions(), **changes)
    prepared = prepare(model, saes, data, test, options, concept=concept, judge=judge)
    circuit = prepared.study.circuit(prepared.study.probe(), progress=progress, warn=True)
    return measure(prepared, circuit, judge=judge, labels=labels)


@dataclass(frozen=True)
class Prepared:
    """A study with what its judge may look at."""

    study: Study
    """Model, SAEs, texts, and the probe."""
    concept: TextSet | None
    """Texts with the spurious label alone, for the judge that correlates."""
    judge: str
    """Name of the judge."""


def prepare(
    model: LanguageModel,
    saes: SAEs,
    data: Source,
    test: Source | None,
    options: ShiftOptions,
    *,
    concept: Source | None = None,
    judge: Judge | None = None,
) -> Prepared:
    """Read and divide the texts; nothing is run but the tokenizer."""
    concept = options.concept_data if concept is None else concept
    name = judge_name(options, concept, judge)
    site = probe_site(model, options.site)
    everything = read_labelled(data, intended=options.intended, spurious=options.spurious)
    texts, rest = _of_classes(everything, options.classes)
    pairing = Pairing.of(texts, options.pairs)
    if test is None:
        texts, held_out = divided(texts, pairing, options.test_share, options.seed)
    else:
        others = read_labelled(test, intended=options.intended, spurious=options.spurious)
        held_out = _of_classes(others, ",".join(pairing.classes))[0]
    if strange := sorted({text.spurious for text in held_out} - set(pairing.spurious)):
        raise UserError(
            f"the test texts have the spurious label {strange[0]!r}, the data {' and '.join(pairing.spurious)}"
        )
    texts, held_out = (usable(some, model, options.position) for some in (texts, held_out))
    agree = [text for text in texts if pairing.agrees(text)]
    groups = {pairing.group(text) for text in texts}
    if not agree:
        raise UserError(
            f"none of the texts whose labels go together has {options.position!r} tokens that the model can read"
        )
    if len({pairing.group(text) for text in held_out}) < 4:
        raise UserError("the texts to test on miss one of the four groups of labels: give others, with --test")
    balanced = equal_groups(texts, pairing, options.examples) if len(groups) == 4 else []
    sets = [(equal_groups(agree, pairing, options.examples), "to train on"), (held_out, "to test on")]
    ambiguous, tested = (text_set(rows, model, options.position, name=what) for rows, what in sets)
    of_balanced = text_set(balanced, model, options.position, name="that are balanced") if balanced else None
    of_concept = None
    if concept is not None:
        rows = rest if concept == REST else read_labelled(concept, intended=None, spurious=options.spurious)
        of_concept = text_set(_known(rows, pairing), model, options.position, name="with the spurious label alone")
    study = Study(model, saes, options, pairing, site, ambiguous, tested, of_balanced)
    return Prepared(study, of_concept, name)


def _of_classes(texts: Sequence[Labelled], classes: str | None) -> tuple[list[Labelled], list[Labelled]]:
    """Texts of the chosen classes, and the others."""
    if classes is None:
        return list(texts), []
    names = {name.strip() for name in classes.split(",")}
    if missing := names - {text.intended for text in texts}:
        shown = ", ".join(sorted({text.intended for text in texts})[:12])
        raise UserError(f"no text has the label {sorted(missing)[0]!r}: there are {shown}")
    return [text for text in texts if text.intended in names], [text for text in texts if text.intended not in names]


def _known(rows: Sequence[Labelled], pairing: Pairing) -> list[Labelled]:
    """Texts with one of the two spurious labels, without their other label."""
    chosen = [replace(text, intended="") for text in rows if text.spurious in pairing.spurious]
    if len({text.spurious for text in chosen}) < 2:
        raise UserError(
            f"the texts of --concept-data do not have both spurious labels, {' and '.join(pairing.spurious)}"
        )
    return chosen


# ------------------------------------------------------------------------------------------ judging and measuring


def measure(
    prepared: Prepared, circuit: Circuit, *, judge: Judge | None = None, labels: Mapping[str, str] | None = None
) -> ShiftReport:
    """Have the features of the probe's circuit judged, ablate them, and score all probes."""
    study = prepared.study
    effects = _effects(study, circuit)
    features = judged(described(study.model, study.saes, effects, study.ambiguous, labels or {}), study,
                      prepared.concept, judge)  # fmt: skip
    edit = study.ablation([one.feature for one in features if one.dropped])
    scores = [_plain(study, results.ORIGINAL, edit=None)]
    if edit is not None:
        scores += _ablated(study, (results.SHIFT, results.CENTRED, results.RETRAINED), edit)
        scores += _random(study, edit)
        scores += _embeddings(prepared, features, judge, labels or {})
        scores += _bottleneck(study, [one.feature for one in features if not one.dropped])
        scores += _skylines(study, len(edit.names), circuit)
    if study.balanced is not None:
        oracle = study.fit(study.x(study.balanced), study.balanced.intended)
        scores.append(study.scored(results.ORACLE, [study.answers(oracle, study.x(study.test))]))
    return ShiftReport(
        site=study.site.name,
        position=study.position,
        classes=study.pairing.classes,
        pairs=study.pairing.spurious,
        judge=prepared.judge,
        operation=study.options.operation,
        features=features,
        scores=scores,
        n_ambiguous=len(study.ambiguous),
        n_balanced=len(study.balanced or ()),
        n_test=len(study.test),
        ambiguous_accuracy=study.original.accuracy,
        edits=[] if edit is None else [edit.to_dict()],
    )


def _effects(study: Study, circuit: Circuit) -> dict[str, float]:
    """The strongest features of a circuit that are judged, with their effects; errors left out."""
    spans = study.read_spans if study.options.tokens == "read" else None
    features = {site: nodes[nodes.is_feature] for site, nodes in circuit.nodes.items()}
    rows = [row for row in ranked(features) if spans is None or row[0].partition("@")[2] in spans]
    return dict(rows[: study.options.features])


def _plain(study: Study, name: str, edit: Edit | None, saes: SAEs | None = None) -> ProbeScore:
    """The original probe, in the edited model."""
    answers = study.answers(study.original, study.x(study.test, edit, saes))
    return study.scored(name, [answers], None if edit is None else len(edit.names))


def _ablated(study: Study, names: Sequence[str], edit: Edit) -> list[ProbeScore]:
    """The original probe on the edited model, with its threshold centred where that has a name, and trained again."""
    x, before, after = study.x(study.test, edit), study.x(study.ambiguous), study.x(study.ambiguous, edit)
    original = study.original
    moved = replace(original, bias=original.bias + ((before - after) @ original.weight).mean())
    probes = [original, moved, study.fit(after, study.ambiguous.intended)]
    probes = probes if len(names) == len(probes) else [probes[0], probes[-1]]
    return [
        study.scored(name, [study.answers(probe, x)], len(edit.names))
        for name, probe in zip(names, probes, strict=True)
    ]


def _random(study: Study, edit: Edit) -> list[ProbeScore]:
    """Scores with as many random active features ablated at the same sites and spans; mean over draws."""
    like = edit.by_span(study.saes)
    active = {span: active_features(study.model, study.saes, study.ambiguous.prompts, span=span) for span in like}
    answers, drawn = [], []
    for draw in range(study.options.random):
        generator = torch.Generator().manual_seed(study.options.seed + draw)
        names = [
            f"{name}{'@' + span if span else ''}"
            for span, features in like.items()
            for name in feature_names(random_features(active[span], features, generator=generator))
        ]
        drawn.append(len(names))
        answers.append(study.answers(study.original, study.x(study.test, study.ablation(names))))
    return [study.scored(results.RANDOM, answers, max(drawn))] if answers else []


def _embeddings(
    prepared: Prepared, features: Sequence[JudgedFeature], judge: Judge | None, labels: Mapping[str, str]
) -> list[ProbeScore]:
    """Scores with the embedding's dropped features alone ablated, at every token."""
    study = prepared.study
    site = Site(EMBED)
    if site not in study.saes:
        return []
    candidates = [one for one in features if one.feature.startswith(f"{EMBED}/")]
    if not candidates and prepared.judge in ("keywords", "concept", "function"):
        effects = _effects(study, study.circuit(study.probe(), sites=EMBED))
        candidates = judged(described(study.model, study.saes, effects, study.ambiguous, labels), study,
                            prepared.concept, judge)  # fmt: skip
    names = list(dict.fromkeys(one.feature.partition("@")[0] for one in candidates if one.dropped))
    edit = study.ablation(names)
    if edit is None:
        row = _plain(study, results.EMBEDDINGS, edit=None)
        return [replace(row, n_features=0)]
    return _ablated(study, (results.EMBEDDINGS, results.EMBEDDINGS_RETRAINED), edit)


def _bottleneck(study: Study, features: Sequence[str]) -> list[ProbeScore]:
    """A probe that sees the activations of the kept features and nothing else."""
    if not features:
        return []
    x, test = (activations(study.model, study.saes, features, texts.prompts) for texts in (study.ambiguous, study.test))
    probe = study.fit(x, study.ambiguous.intended)
    return [study.scored(results.BOTTLENECK, [study.answers(probe, test)], len(features))]


def _skylines(study: Study, n: int, circuit: Circuit) -> list[ProbeScore]:
    """Scores with as many features, and neurons, ablated as the judge dropped: those that push the probe most to the
    spurious label on balanced texts, where what it rightly goes by cancels.
    """
    if study.balanced is None:
        return []
    sites = [Site.parse(name) for name in circuit.metadata["sites"]]
    rows = []
    for name, saes in ((results.FEATURE_SKYLINE, study.saes),
                       (results.NEURON_SKYLINE, neuron_dictionaries(study.model, sites=sites))):  # fmt: skip
        towards = study.circuit(study.probe(), study.balanced, towards_spurious=True, saes=saes)
        edit = study.ablation(_most_towards(towards, n), saes)
        rows.append(_plain(study, name, edit, saes))
    return rows


def _most_towards(circuit: Circuit, n: int) -> list[str]:
    """The n features whose ablation raises the metric most."""
    features: dict[Site, SiteNodes] = {}
    for site, nodes in circuit.nodes.items():
        features[site] = nodes[nodes.is_feature & (nodes.effect > 0)]
    return [name for name, _ in ranked(features)[:n]]
