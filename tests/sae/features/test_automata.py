"""A planted cycle of three states is found; what the model does not predict, and shuffled text, give nothing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.sparse import csr_matrix

from graphs.drawing.automata import Machine, Way, draw_automata
from sae.autoencoder import SAEConfig, SparseAutoencoder
from sae.features.automata import find_automata, joined
from sae.features.transitions import Transition, raised_in_text
from sae.model.load import load_model
from sae.model.sites import Site
from sae.model.tokens import Tokens
from tests.conftest import WORDS, tiny_hf, word_tokenizer

CYCLE, PAIR = (0, 1, 2), (3, 4)
"""Features, each of one word. A model knows what follows in the cycle, not that words of the pair do in the text."""
RESID = Site.parse("resid_1")
TOKENS = [4 + WORDS.index(word) for word in dict.fromkeys(WORDS)][:24]


@pytest.fixture(scope="module")
def planted():
    """A model that sees the last word alone, a dictionary with a feature a word, and text of both."""
    hf = tiny_hf("gpt_neox")
    for name, parameter in hf.named_parameters():
        if "attention.dense" in name or "dense_4h_to_h" in name:
            parameter.data.zero_()
    directions = torch.linalg.qr(torch.randn(32, 32, generator=torch.Generator().manual_seed(0)))[0]
    words = directions - directions.mean(1, keepdim=True)
    embed, unembed = hf.gpt_neox.embed_in.weight.data, hf.lm_head.weight.data
    embed.zero_()
    unembed.zero_()
    embed[TOKENS] = words[: len(TOKENS)] + words[31]
    for state, following in zip(CYCLE, (*CYCLE[1:], CYCLE[0]), strict=True):
        unembed[TOKENS[following]] = words[state]
    hf.gpt_neox.final_layer_norm.weight.data.fill_(1)
    hf.gpt_neox.final_layer_norm.bias.data.zero_()
    model = load_model(hf, tokenizer=word_tokenizer(), device="cpu", check=False)
    rows = torch.nn.functional.normalize(words[: len(TOKENS)], dim=-1)
    tensors = {"W_enc": 1.4 * rows, "b_enc": torch.full((len(rows),), -0.4), "W_dec": rows, "b_dec": torch.zeros(32)}
    sae = SparseAutoencoder(SAEConfig("relu", 32, len(rows), subtract_b_dec=False), tensors)
    return model, sae


def text(shuffled: bool = False) -> list[str]:
    """Sixty texts of forty words: now the cycle, now the pair, now others."""
    draw = np.random.default_rng(0)
    lines = []
    for _ in range(60):
        line: list[int] = []
        while len(line) < 40:
            start = int(draw.integers(3))
            cycle = [CYCLE[(start + i) % 3] for i in range(int(draw.integers(2, 6)))]
            line += [cycle, list(PAIR), draw.integers(5, 24, size=4).tolist()][int(draw.integers(3))]
        line = draw.permutation(line[:40]).tolist() if shuffled else line[:40]
        lines.append(" ".join(list(dict.fromkeys(WORDS))[i] for i in line))
    return lines


def test_a_planted_cycle_is_found_and_what_the_model_does_not_predict_is_not(planted):
    model, sae = planted
    result = find_automata(model, {RESID: sae}, text())
    assert len(result.automata) == 1 and result.automata[0].kind == "cycle"
    (automaton,) = result.automata
    assert {(way.source, way.target) for way in automaton.transitions} == {(0, 1), (1, 2), (2, 0)}
    assert [state.token_ids[0] for state in automaton.states] == [TOKENS[state.feature] for state in automaton.states]
    for way in automaton.transitions:
        assert way.token_ids == [TOKENS[way.target]] and way.raised > 0.4 and 0.2 < way.effect <= 1
        alone = Tokens.from_rows([[TOKENS[way.source]]])  # the feature is the word, and all that the model sees
        with_and_without = [
            model.run(alone, edits={RESID: lambda x, n=n: x - n * sae.decode(sae.encode(x))}).logits for n in (0, 1)
        ]
        p, p_without = (logits[0, -1].softmax(-1) for logits in with_and_without)
        mean = next(state.fires for state in automaton.states if state.feature == way.target) / result.n_tokens
        of_token = torch.full_like(p, mean)  # where the text lacks a token
        of_token[TOKENS] = 0
        of_token[TOKENS[way.target]] = 1
        assert way.effect == pytest.approx(float((p - p_without) @ of_token), abs=1e-3)
    assert result.of_text == {"resid_1": 5} and result.of_model == {"resid_1": 3}  # with the pair, there and back
    assert "1 cycle, 0 chains, 0 loops" in result.text() and result.to_dict()["automata"][0]["kind"] == "cycle"


def test_shuffled_text_has_no_automata(planted):
    model, sae = planted
    result = find_automata(model, {RESID: sae}, text(shuffled=True))
    assert result.automata == [] and result.of_text == {"resid_1": 0} and "0 cycles, 0 chains, 0 loops" in result.text()


def test_transitions_are_those_of_brute_force():
    """T is a difference of means, and its error that of means over whole texts, drawn with replacement."""
    draw = np.random.default_rng(0)
    fired = draw.random((3000, 4)) < 0.2
    texts = np.repeat(np.arange(100), 30)
    following = (draw.random((3000, 3)) < 0.2) * draw.random((3000, 3))
    following[:, 2] += fired[:, 1] * (0.3 + 0.3 * (texts % 2))
    edges, T, error = raised_in_text(csr_matrix(fired), csr_matrix(following), texts, np.random.default_rng(0))
    assert edges.tolist() == [[1, 2]]
    assert T[0] == pytest.approx(following[fired[:, 1], 2].mean() - following[:, 2].mean())
    on, y = fired[:, 1].reshape(100, 30), following[:, 2].reshape(100, 30)
    drawn = draw.integers(100, size=(2000, 100))
    n, both, of_B = on.sum(1), (on * y).sum(1), y.mean(1)
    spread = (both[drawn].sum(1) / n[drawn].sum(1) - of_B[drawn].mean(1)).std()
    assert error[0] == pytest.approx(spread, rel=0.1)


def test_automata_stay_small():
    ways = [Transition(i, i + 1, 50, 0.5, 0.01, 0.9 - 0.01 * i, 0.01, []) for i in range(20)]
    parts = joined([*ways, *(Transition(0, i, 50, 0.5, 0.01, 0.01, 0.001, []) for i in range(1, 8))])
    assert [len({way.source for way in part} | {way.target for way in part}) for part in parts] == [8, 8, 5]
    assert sum(way.source == 0 for way in parts[0]) == 3


def test_tokens_with_signs_of_graphviz_are_drawn(tmp_path):
    words = 'a " \\'
    machine = Machine("t", {"resid_0/1": ("", words), "resid_0/2": ("x", "y")}, [
        Way("resid_0/1", "resid_0/2", 0.5, words, words),
    ])  # fmt: skip
    assert words in draw_automata([machine], tmp_path / "a.svg").read_text()


def test_no_automata_are_a_picture_too(tmp_path):
    assert b"no feature makes another come next" in draw_automata([], tmp_path / "none.svg").read_bytes()
