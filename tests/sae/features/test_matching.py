"""Matches against double loops, on dictionaries whose relation is known."""

import pytest
import torch
from torch.nn.functional import cosine_similarity, normalize

from sae.autoencoder import SparseAutoencoder, SparseFeatures
from sae.errors import UserError
from sae.features import matching as similarity
from sae.features.matching import (
    ActivationCorrelation,
    Match,
    match_by_activation,
    match_features,
    nearest_features,
    persistent_features,
    split_features,
)
from sae.model.sites import Site
from tests.sae.evaluation.test_evaluate import random_sae


def directions(n, d, seed):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("chunk_bytes", [1, 200, 10**6])
def test_nearest_features_equal_a_double_loop(chunk_bytes):
    W_dec, asked = directions(20, 6, 0), torch.tensor([3, 17, 4])
    cosine, index = nearest_features(W_dec, asked, k=4, chunk_bytes=chunk_bytes)
    for row, i in enumerate(asked.tolist()):
        scores = sorted((float(cosine_similarity(W_dec[i], W_dec[j], dim=0)), j) for j in range(20) if j != i)[::-1]
        assert index[row].tolist() == [j for _, j in scores[:4]]
        assert cosine[row].tolist() == pytest.approx([score for score, _ in scores[:4]], abs=1e-6)


def test_nearest_features_of_another_dictionary_may_be_the_same_direction():
    W_dec = directions(10, 6, 1)
    cosine, index = nearest_features(W_dec, torch.arange(10), among=W_dec.flip(0) * 3.0, k=1)
    assert index[:, 0].tolist() == list(range(9, -1, -1))
    assert torch.allclose(cosine, torch.ones(10, 1), atol=1e-5)
    assert sorted(nearest_features(W_dec[:3], torch.tensor([1]), k=9)[1][0].tolist()) == [0, 2]
    opposed = torch.tensor([[1.0, 0.0], [-1.0, 0.1], [-1.0, -0.2]])
    assert nearest_features(opposed, torch.tensor([0]), k=2)[1].tolist() == [[2, 1]]
    assert nearest_features(W_dec, torch.empty(0, dtype=torch.int64), k=2)[0].shape == (0, 2)


@pytest.mark.parametrize("chunk_bytes", [1, 300, 10**6])
def test_match_equals_a_double_loop(chunk_bytes):
    a, b = directions(13, 5, 2), directions(9, 5, 3)
    match = match_features(a, b, chunk_bytes=chunk_bytes)
    table = [[float(cosine_similarity(u, v, dim=0)) for v in b] for u in a]
    for i, row in enumerate(table):
        j = max(range(9), key=row.__getitem__)
        assert int(match.partner[i]) == j
        assert float(match.similarity[i]) == pytest.approx(row[j], abs=1e-6)
        assert bool(match.mutual[i]) == (max(range(13), key=lambda m, j=j: table[m][j]) == i)
    assert match.mean == pytest.approx(sum(max(row) for row in table) / 13, abs=1e-6)


def test_a_permuted_dictionary_is_found_again():
    a, order = directions(50, 16, 4), torch.randperm(50, generator=torch.Generator().manual_seed(5))
    match = match_features(a, a[order])
    assert torch.equal(order[match.partner], torch.arange(50))
    assert match.mutual.all()
    assert persistent_features(match).tolist() == list(range(50))
    noisy = match_features(a, torch.cat([a[order][:20], directions(30, 16, 6)]))
    assert persistent_features(noisy, threshold=0.999).tolist() == sorted(order[:20].tolist())


def test_features_persist_with_a_mutual_partner_of_at_least_the_threshold():
    similarity = torch.tensor([0.9, 0.5, 0.9, 0.4])
    match = Match(torch.tensor([1, 2, 1, 3]), similarity, torch.tensor([True, True, False, True]))
    assert persistent_features(match, threshold=0.5).tolist() == [0, 1]


def sparse(f):
    token, feature = f.nonzero(as_tuple=True)
    return SparseFeatures(token, feature, f[token, feature])


@pytest.mark.parametrize("split", [[200], [1, 99, 0, 100]])
@pytest.mark.parametrize("chunk_bytes", [40, 10**6])
def test_activation_correlation_is_pearson(split, chunk_bytes, monkeypatch):
    monkeypatch.setattr(similarity, "CHUNK_BYTES", chunk_bytes)
    f, g = directions(200, 7, 7).relu(), directions(200, 4, 8).relu()
    g[:, 1] = 2.5 * f[:, 3] + 1.0
    f[:, 5] = 0.0
    f[:, 6] = 0.3  # never varies
    sums = ActivationCorrelation(7, 4)
    for a, b in zip(f.split(split), g.split(split), strict=True):
        sums.update(sparse(a), sparse(b), len(a))
    rows = sums.rows(slice(0, 7))
    assert not rows[5].any()
    assert not rows[6].any()
    expected = torch.corrcoef(torch.cat([f[:, :5], g], 1).double().T)[:5, 5:].float()
    assert torch.allclose(rows[:5], expected, atol=1e-5)
    match = sums.match(chunk_bytes=40)
    assert int(match.partner[3]) == 1
    assert float(match.similarity[3]) == pytest.approx(1.0, abs=1e-5)
    assert bool(match.mutual[3])


@pytest.mark.parametrize("value", [0.1, 0.3, 0.7])
def test_a_feature_that_never_varies_correlates_with_nothing_whatever_is_rounded(value):
    sums = ActivationCorrelation(1, 3)
    sums.update(sparse(torch.full((1000, 1), value)), sparse(directions(1000, 3, 9).relu()), 1000)
    assert not sums.rows(slice(0, 1)).any()


def test_match_over_a_text_finds_the_same_dictionary_and_tells_layers_apart(tiny_model):
    texts = ["the man sees the old dog", "a girl walks", "<bos> kings know that they were happy .", "he sees her"]
    first = random_sae("resid_0", tiny_model.d_model, seed=1)
    order = torch.randperm(24, generator=torch.Generator().manual_seed(2))
    shuffled = {name: t if name == "b_dec" else t[order] for name, t in first.named_buffers()}
    second = SparseAutoencoder(first.config, shuffled)
    site, last = Site("resid", 0), Site("resid", 1)
    match = match_by_activation(tiny_model, (site, first), (site, second), texts, batch_size=3)
    alive = match.similarity > 0
    assert alive.sum() > 10
    assert torch.equal(order[match.partner[alive]], torch.arange(24)[alive])
    across = match_by_activation(tiny_model, (site, first), (last, second), texts)
    runs = [tiny_model.run(tiny_model.tokenize([text]), capture=[site, last]).activations for text in texts]
    f, g = (torch.cat([run[s][0] for run in runs]) for s in (site, last))
    special = torch.tensor(
        [i in tiny_model.special_ids for t in texts for i in tiny_model.tokenize([t]).input_ids[0].tolist()]
    )
    stacked = torch.cat([first.encode(f[~special]), second.encode(g[~special])], 1).double()
    table = torch.corrcoef(stacked.T)[:24, 24:].nan_to_num(0.0)
    assert torch.allclose(across.similarity.double(), table.max(1).values.clamp(min=0.0), atol=1e-4)
    with pytest.raises(UserError, match="no tokens"):
        match_by_activation(tiny_model, (site, first), (site, second), [])


def test_split_features_are_the_wide_ones_around_a_narrow_one():
    narrow = torch.eye(6)[:3]
    wide = torch.stack(
        [
            narrow[0] + 0.3 * torch.eye(6)[4],
            torch.eye(6)[5],
            narrow[0] - 0.3 * torch.eye(6)[4],
            narrow[1],
        ]
    )
    assert split_features(narrow, normalize(wide, dim=-1)) == {0: [0, 2]}
    assert split_features(narrow, wide, threshold=0.99) == {}


def test_what_cannot_be_compared_is_refused():
    with pytest.raises(UserError, match="width 5 and 6"):
        match_features(directions(3, 5, 0), directions(3, 6, 0))
