"""Feature absorption (Chanin et al. 2024, arXiv 2409.14507; SAEBench) on the first letter of words.

A feature "begins with S" that is silent on "short", because a feature of "short" carries the letter too, is absorbed.

1. Words are tokens of letters alone, each behind `SHOTS` examples of the task, and read at the word itself.
2. For each letter a probe of x gives a direction, and the *main* features are those of the best sparse probe: by the
   largest weights of a regression with an L1 penalty, one more as long as F1 on test words grows by `JUMP`.
3. Of the test words of a letter that its probe finds, with c_i the cosine of W_dec_i and the probe:
   - fully absorbed: no main feature is active, and of f_i c_i the largest has c_i >= `FULL_COSINE` and is at least
     `SHARE` of x · probe;
   - absorbed fraction: a / (a + main part), where a is what the `ABSORBERS` strongest other features with c_i >=
     `COSINE` write along the probe, at most what the main part leaves of x · probe; 0 where they write less than
     `SHARE` of it, or the main features write all of it.
4. Both are means over the words of a letter, then over letters whose probe works.

SAEBench measures it in models of a billion parameters and more, at 16,384 features and more: smaller models do not tell
the letters apart, and `Inapplicable` says how far they do.

Shapes: n words, d model width, F features.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from string import ascii_lowercase

import torch
from torch import Tensor
from torch.nn.functional import normalize

from circuits.benchmark.options import SuiteOptions
from circuits.debiasing.probing import Pooled
from circuits.metrics.fit_probe import regress
from circuits.uncertainty.bootstrap import Bootstrap
from sae.autoencoder import SparseAutoencoder
from sae.model.language_model import LanguageModel
from sae.model.sites import Site
from sae.model.tokens import Tokens

SHOTS = 10
EXAMPLE = "{word} has the first letter: {letter}\n"
MOST_MAIN = 10
JUMP = 0.03
WORKS = 0.6
"""F1 from which a letter's probe works."""
TEST_SHARE = 0.2
MIN_WORDS = 10
"""Words a letter must have."""
SILENT, FULL_COSINE, COSINE, SHARE, ABSORBERS = 1e-8, 0.025, 0.1, 0.4, 3
L1 = 0.01
"""Weight of the L1 penalty beside the mean loss of a word."""
BATCH = 64


@dataclass(frozen=True)
class LetterAbsorption:
    """One letter."""

    letter: str
    """The letter."""
    words: int
    """Test words with it that its probe finds."""
    f1: float
    """F1 of its probe."""
    main: list[int]
    """Its main features."""
    full: float
    """Share of the words that are fully absorbed."""
    fraction: float
    """Mean absorbed fraction."""


@dataclass(frozen=True)
class Absorption:
    """Absorption at one site, means over letters."""

    site: str
    """Site."""
    full: float
    """Share of words that are fully absorbed."""
    full_interval: tuple[float, float]
    """95 % interval over words."""
    fraction: float
    """Mean absorbed fraction."""
    fraction_interval: tuple[float, float]
    """95 % interval over words."""
    main: float
    """Mean number of main features of a letter."""
    letters: list[LetterAbsorption]
    """Each letter whose probe works."""


class Inapplicable(Exception):
    """The task cannot be done with this model; the message says why."""


@dataclass(frozen=True)
class Words:
    """Words of a vocabulary with their first letters, as prompts."""

    tokens: Tokens
    """Prompts, each ending in its word, [n, S]."""
    letters: list[str]
    """[n] first letters."""
    test: Tensor
    """[n] bool, whether a word is tested on."""


def absorbed(f: Tensor, x: Tensor, direction: Tensor, main: Sequence[int], W_dec: Tensor) -> tuple[Tensor, Tensor]:
    """Whether each word is fully absorbed, [n] bool, and its absorbed fraction, [n].

    f: [n, F] features; x: [n, d] activations; direction: [d] of the probe; main: the main features.
    """
    unit = normalize(direction, dim=0)
    cosine = normalize(W_dec, dim=-1) @ unit  # [F]
    part, total = f * cosine, x @ unit  # [n, F], [n]
    is_main = torch.zeros(len(cosine), dtype=torch.bool)
    is_main[list(main)] = True
    of_main = part[:, is_main].sum(-1)
    candidates = part.clamp(min=0) * (~is_main & (cosine >= COSINE))
    of_others = candidates.topk(min(ABSORBERS, candidates.shape[1]), dim=-1).values.sum(-1)
    taken = torch.minimum(of_others, total - of_main)
    fraction = torch.where(of_main <= 0, 1.0, (taken / (taken + of_main)).clamp(0, 1))
    fraction = fraction.masked_fill((of_main >= total) | ~(of_others / total >= SHARE), 0.0)
    largest = part.max(-1)
    full = (f[:, is_main] < SILENT).all(-1) & (cosine[largest.indices] >= FULL_COSINE) & (total >= 0)
    return full & (largest.values / total >= SHARE), fraction


def first_letter_words(model: LanguageModel, options: SuiteOptions) -> Words:
    """The words of the vocabulary with examples of the task before them; `Inapplicable` where there are too few."""
    coder = model.text_coder
    ids = [token for token in range(model.vocab_size) if token not in model.special_ids]
    strings = model.token_strings(torch.tensor(ids))
    by_letter: dict[str, list[tuple[int, str]]] = {}
    n_words = 0
    for token, string in zip(ids, strings, strict=True):
        word = string.strip()
        if word.isascii() and word.isalpha() and n_words < options.words:
            by_letter.setdefault(word[0].lower(), []).append((token, string))
            n_words += 1
    by_letter = {letter: by_letter[letter] for letter in ascii_lowercase if len(by_letter.get(letter, ())) >= MIN_WORDS}
    if len(by_letter) < options.letters:
        raise Inapplicable(
            f"the vocabulary has {n_words:,} words, with {MIN_WORDS} or more for {len(by_letter)} first letters: "
            f"absorption needs {options.letters} letters"
        )
    draw = random.Random(options.seed)
    words = [(letter, token, string) for letter, entries in by_letter.items() for token, string in entries]
    unknown = coder.tokenizer.unk_token_id
    knows = unknown is None or unknown not in coder.own_ids([EXAMPLE.format(word="the", letter="T")])[0]
    texts = []
    for _, _, string in words:
        others = draw.sample(words, SHOTS + 1) if knows else []
        shots = [other for other in others if other[2] != string][:SHOTS]
        texts.append("\n" + "".join(EXAMPLE.format(word=word, letter=one.upper()) for one, _, word in shots))
    before = coder.prompt_ids(texts) if knows else [list(coder.prefix) for _ in words]
    rows = [[*context, token] for context, (_, token, _) in zip(before, words, strict=True)]
    letters = [letter for letter, _, _ in words]
    test = torch.zeros(len(rows), dtype=torch.bool)
    for letter in by_letter:
        same_letter = [row for row, other in enumerate(letters) if other == letter]
        test[draw.sample(same_letter, round(TEST_SHARE * len(same_letter)))] = True
    return Words(Tokens.from_rows(rows, pad_id=coder.pad_id), letters, test)


@torch.no_grad()
def read_words(model: LanguageModel, sae: SparseAutoencoder, site: Site, words: Words) -> Pooled:
    """Activation [n, d] and features [n, F] at each word."""
    read, xs, fs = sae.config.read_site(site), [], []
    for start in range(0, len(words.letters), BATCH):
        batch = words.tokens[start : start + BATCH].to(model.device)
        run = model.run(batch, capture={site, read}, need_logits=False)
        xs.append(run.activations[site][:, -1].float().cpu())
        fs.append(sae.encode(run.activations[read][:, -1]).float().cpu())
    return Pooled(torch.cat(xs), torch.cat(fs))


def absorption(site: Site, words: Words, read: Pooled, W_dec: Tensor, options: SuiteOptions) -> Absorption:
    """Absorption at a site; `Inapplicable` where the model does not tell enough letters apart."""
    letters = sorted(set(words.letters))
    is_letter = {one: torch.tensor([other == one for other in words.letters]) for one in letters}
    probes = {one: _probe(read.x, is_letter[one], words.test) for one in letters}
    working = [one for one in letters if probes[one].f1 > WORKS]
    if len(working) < options.letters:
        raise Inapplicable(
            f"at {site} the first letter of words can be read for {len(working)} letters (F1 above {WORKS}): "
            f"absorption needs {options.letters}"
        )
    entries, full, fraction = [], [], []
    for one in working:
        probe = probes[one]
        chosen = words.test & is_letter[one] & (read.x @ probe.weight + probe.bias > 0)
        main = main_features(read.f, is_letter[one], words.test)
        of_words = absorbed(read.f[chosen], read.x[chosen], probe.weight, main, W_dec)
        full.append(of_words[0].double())
        fraction.append(of_words[1].double())
        means = [values.double().mean().item() for values in of_words]
        entries.append(LetterAbsorption(one, int(chosen.sum()), probe.f1, main, *means))
    n = len(entries)
    bounds = [_interval(values, options.seed) for values in (full, fraction)]
    mean_full, mean_fraction, mean_main = (
        sum(values) / n
        for values in ([e.full for e in entries], [e.fraction for e in entries], [len(e.main) for e in entries])
    )
    return Absorption(site.name, mean_full, bounds[0], mean_fraction, bounds[1], mean_main, entries)


@dataclass(frozen=True)
class _LetterProbe:
    weight: Tensor  # [d]
    bias: Tensor  # []
    f1: float


def _probe(x: Tensor, is_letter: Tensor, test: Tensor) -> _LetterProbe:
    weight, bias = regress(x[~test].double().numpy(), is_letter[~test].int().tolist(), balanced=True)
    return _LetterProbe(weight.float(), bias.float(), _f1(x[test].double() @ weight + bias > 0, is_letter[test]))


def _f1(answers: Tensor, truth: Tensor) -> float:
    from sklearn.metrics import f1_score

    return float(f1_score(truth.numpy(), answers.numpy(), zero_division=0.0))


def main_features(f: Tensor, is_letter: Tensor, test: Tensor) -> list[int]:
    """The features of a letter: the smallest sparse probe that one more feature does not better by `JUMP` in F1."""
    import sklearn
    from scipy.sparse import csr_matrix
    from sklearn.linear_model import LogisticRegression

    train, y = f[~test].double().numpy(), is_letter[~test].numpy()
    has_ratio = tuple(map(int, sklearn.__version__.split(".")[:2])) >= (1, 8)  # where `penalty` is deprecated
    penalty = {"l1_ratio": 1.0} if has_ratio else {"penalty": "l1"}
    sparse = LogisticRegression(C=1 / (L1 * len(y)), solver="liblinear", random_state=0, **penalty)
    weight = torch.from_numpy(sparse.fit(csr_matrix(train), y).coef_[0])
    order = weight.argsort(descending=True)[: int((weight > 0).sum())].tolist() or [int(weight.argmax())]
    best, main = -1.0, order[:1]
    for k in range(1, min(MOST_MAIN, len(order)) + 1):
        probe = LogisticRegression(max_iter=500, class_weight="balanced").fit(train[:, order[:k]], y)
        score = _f1(torch.from_numpy(probe.predict(f[test][:, order[:k]].double().numpy())), is_letter[test])
        if score <= best + JUMP:
            break
        best, main = score, order[:k]
    return main


def _interval(by_letter: Sequence[Tensor], seed: int) -> tuple[float, float]:
    """95 % interval over words of a mean over letters of means over words."""
    shares = torch.cat([values / (len(by_letter) * len(values)) for values in by_letter if len(values)])
    weights = torch.full_like(shares, 1 / len(shares))
    low, high = Bootstrap(seed=seed).intervals(shares[:, None], weights)[0].tolist()
    return low, high
