"""Transformers whose circuit is known because their weights were set by hand, with dictionaries of what they represent.

1. Everything a model represents is a named direction; directions are orthonormal and have mean zero. A constant of
   length BULK in the stream makes LayerNorm all but linear: LN(x) = x up to some parts in a thousand.
2. A `Head` matches query directions with key directions and moves directions; a `Neuron` reads some and writes others.
   All weights get noise, so that nothing is exactly without effect.
3. The dictionary of a site has one feature a direction written so far, and JUNK features that fire on the same
   tokens and write what nobody reads, which the error takes back.
4. `recovery` says how well scores separate the true nodes or edges from all others (AUROC as in MIB's InterpBench,
   Mueller et al. 2025; Gupta et al. 2024), with precision and recall over thresholds.

Shapes: d model width, F features, V vocabulary, S positions.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise, permutations

import numpy as np
import torch
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from circuits.prompts.dataset import PromptSet
from sae.autoencoder import SAEConfig, SparseAutoencoder
from sae.model.language_model import LanguageModel, Tokens
from sae.model.load import load_model
from sae.model.sites import Site

WIDTH, HEADS, NEURONS = 128, 4, 64
BULK = 30.0
NOISE = 2e-3
JUNK = 8
THRESHOLD = 0.1

Mix = Mapping[str, float]
"""Direction -> coefficient."""


@dataclass(frozen=True)
class Head:
    """One attention head."""

    match: Sequence[tuple[str, str, float]]
    """(query direction, key direction, score)."""
    move: Mapping[str, str]
    """Direction read where it attends -> direction written."""


@dataclass(frozen=True)
class Neuron:
    """relu(reads . x + bias), written to the stream."""

    reads: Mix
    bias: float
    writes: Mix


@dataclass(frozen=True)
class Layer:
    """A block: its heads, then its neurons."""

    heads: Sequence[Head] = ()
    neurons: Sequence[Neuron] = ()


@dataclass(frozen=True)
class Plan:
    """A transformer in words."""

    embed: Mapping[str, Mix]
    """Token -> what its embedding holds."""
    positions: Sequence[Mix]
    """What each position's embedding holds."""
    layers: Sequence[Layer]
    unembed: Mapping[str, Mix]
    """Token -> what its logit reads."""

    def written(self) -> dict[Site, list[str]]:
        """The directions that live at each site, in forward order."""
        stream = sorted({name for mix in (*self.embed.values(), *self.positions) for name in mix})
        written = {Site("embed"): list(stream)}
        for number, layer in enumerate(self.layers):
            moved = sorted({name for head in layer.heads for name in head.move.values()})
            computed = sorted({name for neuron in layer.neurons for name in neuron.writes})
            stream = list(dict.fromkeys([*stream, *moved, *computed]))
            written |= {Site("attn", number): moved, Site("mlp", number): computed, Site("resid", number): stream}
        return written


@dataclass(frozen=True)
class GroundTruth:
    """A model, its dictionaries, prompts, and the circuit that is true of them."""

    model: LanguageModel
    saes: dict[Site, SparseAutoencoder]
    prompts: PromptSet
    features: dict[Site, list[str]]
    """Names of each dictionary's features, in order; the JUNK ones behind them have none."""
    nodes: set[str] = field(default_factory=set)
    """The true nodes, `resid_0/3`."""
    edges: set[tuple[str, str]] = field(default_factory=set)
    """The true edges; `metric` is the last node of every path."""

    def node(self, site: str, direction: str) -> str:
        """The name of the feature of a direction."""
        return f"{site}/{self.features[Site.parse(site)].index(direction)}"

    def all_nodes(self) -> list[str]:
        """Every feature and error of every site."""
        return [f"{site}/{what}" for site, sae in self.saes.items() for what in (*range(len(sae.W_dec)), "error")]


def build(plan: Plan, *, seed: int = 0) -> tuple[LanguageModel, dict[Site, SparseAutoencoder], dict[Site, list[str]]]:
    """The transformer of a plan, its dictionaries, and the names of their features."""
    generator = torch.Generator().manual_seed(seed)
    written = plan.written()
    names = written[next(reversed(written))]
    directions, unused, bulk = _directions(names, generator)
    hf = _hf(plan, directions, bulk)
    with torch.no_grad():
        for name, parameter in hf.named_parameters():
            if "ln_" not in name:
                parameter += NOISE * torch.randn(parameter.shape, generator=generator)
    model = load_model(hf, tokenizer=_tokenizer(list(plan.embed)), device="cpu")
    saes = {site: _dictionary(site, here, directions, unused, bulk, generator) for site, here in written.items()}
    return model, saes, written


def _directions(names: Sequence[str], generator: torch.Generator):
    """Unit vectors of mean zero, orthogonal to each other: {name: [d]}, unused ones [n, d], and the constant's [d]."""
    raw = torch.randn(WIDTH, WIDTH, generator=generator)
    raw[:, 0] = 1
    basis = torch.linalg.qr(raw)[0].T[1:]  # [d - 1, d], orthogonal to the constant vector
    return dict(zip(names, basis[1:], strict=False)), basis[1 + len(names) :], BULK * basis[0]


def _mixed(mix: Mix, directions: Mapping[str, torch.Tensor]) -> torch.Tensor:
    return sum((weight * directions[name] for name, weight in mix.items()), torch.zeros(WIDTH))


@torch.no_grad()
def _hf(plan: Plan, directions: Mapping[str, torch.Tensor], bulk: torch.Tensor) -> GPT2LMHeadModel:
    config = GPT2Config(
        vocab_size=len(plan.embed), n_positions=len(plan.positions), n_embd=WIDTH, n_layer=len(plan.layers),
        n_head=HEADS, n_inner=NEURONS, activation_function="relu", scale_attn_weights=False,
        tie_word_embeddings=False, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    hf = GPT2LMHeadModel(config).eval()
    for name, parameter in hf.named_parameters():
        parameter.zero_()
        if "ln_" in name and name.endswith("weight"):
            parameter += BULK / WIDTH**0.5
    body = hf.transformer
    body.wte.weight.copy_(torch.stack([_mixed(mix, directions) for mix in plan.embed.values()]))
    body.wpe.weight.copy_(torch.stack([_mixed(mix, directions) + bulk for mix in plan.positions]))
    hf.lm_head.weight.copy_(torch.stack([_mixed(plan.unembed.get(token, {}), directions) for token in plan.embed]))
    for block, layer in zip(body.h, plan.layers, strict=True):
        query, key, value = block.attn.c_attn.weight.split(WIDTH, dim=1)  # [d, d] each, a head's columns together
        out = block.attn.c_proj.weight
        for number, head in enumerate(layer.heads):
            first = number * WIDTH // HEADS
            for column, (asked, given, score) in enumerate(head.match, start=first):
                query[:, column] = score**0.5 * directions[asked]
                key[:, column] = score**0.5 * directions[given]
            for column, (source, target) in enumerate(head.move.items(), start=first):
                value[:, column] = directions[source]
                out[column] = directions[target]
        for number, neuron in enumerate(layer.neurons):
            block.mlp.c_fc.weight[:, number] = _mixed(neuron.reads, directions)
            block.mlp.c_fc.bias[number] = neuron.bias
            block.mlp.c_proj.weight[number] = _mixed(neuron.writes, directions)
    return hf


def _dictionary(site: Site, names, directions, unused, bulk, generator) -> SparseAutoencoder:
    """One feature a direction, active above THRESHOLD, and junk."""
    true = torch.stack([directions[name] for name in names]) if names else torch.zeros(0, WIDTH)
    reads = torch.randn(JUNK, max(len(names), 1), generator=generator)
    junk = reads @ true if names else torch.randn(JUNK, WIDTH, generator=generator)
    n_features = len(names) + JUNK
    tensors = {
        "W_enc": torch.cat([true, torch.nn.functional.normalize(junk, dim=-1)]),
        "b_enc": torch.zeros(n_features),
        "W_dec": torch.cat([true, unused[:JUNK]]),
        "b_dec": bulk if site.kind in ("embed", "resid") else torch.zeros(WIDTH),
        "threshold": torch.full((n_features,), THRESHOLD),
    }
    return SparseAutoencoder(SAEConfig("jumprelu", WIDTH, n_features, site=site.name), tensors)


def _tokenizer(words: Sequence[str]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token=words[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token=words[0], pad_token=words[0])


def _prompts(model: LanguageModel, rows: Sequence[tuple[Sequence[str], Sequence[str], str, str]]) -> PromptSet:
    """Pairs of equally long prompts: (clean words, patch words, clean answer, patch answer)."""
    ids = model.tokenizer.get_vocab()
    clean, patch, answer, other = zip(*rows, strict=True)
    return PromptSet(
        clean=Tokens.from_rows([[ids[word] for word in words] for words in clean]),
        patch=Tokens.from_rows([[ids[word] for word in words] for words in patch]),
        clean_answers=torch.tensor([ids[word] for word in answer]),
        patch_answers=torch.tensor([ids[word] for word in other]),
        cases=["pair"] * len(rows),
        templates=["pair"] * len(rows),
        texts=[" ".join(words) for words in clean],
    )


# --- an induction circuit ---------------------------------------------------------------------------------------------


def induction() -> GroundTruth:
    """After "A B D E A" comes B: one head notes the previous word, another looks for it and copies what stands there.

    Pairs swap A and D, so the answer becomes E. Distractors: the words themselves after layer 0 (they change places
    but nothing reads them), their classes, the class of the last word but three, and a copy of the first word.
    """
    words = [f"w{n}" for n in range(6)]
    places = [f"p{n}" for n in range(6)]
    classes = {word: f"class{n % 3}" for n, word in enumerate(words)}
    previous = Head([(places[n + 1], places[n], 16.0) for n in range(5)], {word: f"prev_{word}" for word in words})
    look = Head([(word, f"prev_{word}", 5.0) for word in words], {word: f"out_{word}" for word in words})
    first = Head([(place, places[1], 16.0) for place in places], {word: f"first_{word}" for word in words})
    plan = Plan(
        embed={"bos": {}} | {word: {word: 1.0} for word in words},
        positions=[{place: 1.0} for place in places],
        layers=[
            Layer([previous], [Neuron({word: 1.0}, 0.0, {classes[word]: 1.0}) for word in words]),
            Layer([look, first], [Neuron({name: 1.0}, 0.0, {f"late_{name}": 1.0}) for name in set(classes.values())]),
        ],
        unembed={word: {f"out_{word}": 4.0} for word in words},
    )
    model, saes, features = build(plan)
    random = np.random.default_rng(0)
    rows = []
    for a, b in permutations(words, 2):
        d, e = random.permutation([word for word in words if word not in (a, b)])[:2]
        rows.append((["bos", a, b, d, e, a], ["bos", d, b, a, e, a], b, e))
    truth = GroundTruth(model, saes, _prompts(model, rows), features)
    for word in words:
        path = [truth.node(site, f"prev_{word}") for site in ("attn_0", "resid_0")]
        late = [truth.node(site, f"out_{word}") for site in ("attn_1", "resid_1")]
        _add_path(truth, [truth.node("embed", word), *path])
        _add_path(truth, [*late, "metric"])
        for other in words:
            if other != word:
                truth.edges.add((path[-1], truth.node("attn_1", f"out_{other}")))
    return truth


# --- a number circuit with an attractor -------------------------------------------------------------------------------


def agreement(*, repeats: int = 16) -> GroundTruth:
    """The verb in "the boy near the girls [runs]" agrees with the noun at position 1, not with the one at 4.

    Pairs flip both. A head at the last position attends to position 1 alone and carries the number it finds there;
    neurons turn it into the verb's. Distractors: the nouns themselves, the attractor's number, and neurons for the
    number at either place. Positions are kept, since only they tell the subject from the attractor.
    """
    nouns, numbers = ["boy", "girl", "dog", "cat"], ["sg", "pl"]
    places = [f"p{n}" for n in range(6)]
    form = {(noun, number): f"{noun}_{number}" for noun in nouns for number in numbers}
    carry = Head([(places[5], places[1], 16.0)], {number: f"subject_{number}" for number in numbers})
    local = [
        Neuron({number: 1.0, places[at]: 1.0}, -1.0, {f"{number}_at_{at}": 1.0}) for number in numbers for at in (1, 4)
    ]
    verbs = [
        Neuron({f"subject_{number}": 1.0, f"subject_{other}": -0.5}, 0.0, {f"verb_{number}": 1.0})
        for number, other in permutations(numbers)
    ]
    plan = Plan(
        embed={"bos": {}, "the": {"the": 1.0}, "near": {"near": 1.0}, ".": {}, "runs": {}, "run": {}}
        | {word: {noun: 1.0, number: 1.0} for (noun, number), word in form.items()},
        positions=[{place: 1.0} for place in places],
        layers=[Layer([], local), Layer([carry], verbs)],
        unembed={"runs": {"verb_sg": 2.0}, "run": {"verb_pl": 2.0}},
    )
    model, saes, features = build(plan)
    random = np.random.default_rng(0)
    verb = {"sg": "runs", "pl": "run"}
    rows = []
    for number, other in [*permutations(numbers)] * repeats:
        subject, attractor = random.choice(nouns, 2, replace=False)
        clean, patch = (
            ["the", form[subject, one], "near", "the", form[attractor, two], "."]
            for one, two in zip((number, other), random.permutation(numbers), strict=True)
        )
        rows.append((clean, patch, verb[number], verb[other]))
    truth = GroundTruth(model, saes, _prompts(model, rows), features)
    for number, other in permutations(numbers):
        carried = truth.node("attn_1", f"subject_{number}") + "@5"
        early = [truth.node(site, number) + "@1" for site in ("embed", "resid_0")]
        late = [truth.node(site, f"verb_{number}") + "@5" for site in ("mlp_1", "resid_1")]
        _add_path(truth, [*early, carried, *late, "metric"])
        truth.edges.add((carried, truth.node("mlp_1", f"verb_{other}") + "@5"))
    return truth


def _add_path(truth: GroundTruth, path: Sequence[str]) -> None:
    truth.nodes.update(name for name in path if name != "metric")
    truth.edges.update(pairwise(path))


# --- how well it was found --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recovery:
    """Scores against the truth."""

    auroc: float
    """Chance that a true item outscores a false one."""
    average_precision: float
    """Area under precision over recall."""
    precision_at_truth: float
    """Precision of the n highest scores, n the number of true items; equal to recall there."""
    precision: list[float]
    """Over falling thresholds, beside `recall`."""
    recall: list[float]
    n_true: int
    n_false: int


def recovery(scores: Mapping, truth: Collection, universe: Collection) -> Recovery:
    """How well |scores| (0 where there is none) tell the `truth` from the rest of the `universe`."""
    items = list(universe)
    missing = set(truth) - set(items)
    if missing:
        raise ValueError(f"true but not in the universe: {sorted(missing)[:3]}")
    true = np.array([item in truth for item in items])
    score = np.array([abs(scores.get(item, 0.0)) for item in items])
    precision, recall, _ = precision_recall_curve(true, score)
    best = np.argsort(-score, kind="stable")[: true.sum()]
    return Recovery(
        auroc=float(roc_auc_score(true, score)),
        average_precision=float(average_precision_score(true, score)),
        precision_at_truth=float(true[best].mean()),
        precision=precision.tolist()[::-1],
        recall=recall.tolist()[::-1],
        n_true=int(true.sum()),
        n_false=int((~true).sum()),
    )
