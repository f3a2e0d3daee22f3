"""Streamed autoencoders: the same numbers as all in memory, and never more in memory than was allowed."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from sae import saes as streaming
from sae.autoencoder import SAEConfig, SparseAutoencoder
from sae.errors import UserError
from sae.formats import save_sae
from sae.model.sites import Site
from sae.saes import SAEs, Source, free_memory, load_saes, saes_fingerprint
from sae.splice import check_saes

D, F, N = 16, 64, 6
ONE = SAEConfig("relu", D, F).n_bytes


@pytest.fixture
def folder(tmp_path):
    """Six autoencoders of random weights."""
    for layer in range(N):
        generator = torch.Generator().manual_seed(layer)
        W_dec = torch.nn.functional.normalize(torch.randn(F, D, generator=generator), dim=-1)
        tensors = {
            "W_enc": W_dec.clone(),
            "b_enc": torch.zeros(F),
            "W_dec": W_dec,
            "b_dec": torch.full((D,), 1.0 * layer),
        }
        SparseAutoencoder(SAEConfig("relu", D, F, f"resid_{layer}"), tensors).save(tmp_path / "saes" / f"resid_{layer}")
    return tmp_path


@pytest.fixture
def quick_gc():
    """The collector looks through what is made from now on, not through all that the tests before have left."""
    gc.collect()
    gc.freeze()


def sites(*layers: int) -> list[Site]:
    return [Site("resid", layer) for layer in layers]


def test_the_size_is_that_of_the_tensors(folder):
    sae = load_saes(folder)[Site("resid", 0)]
    held = sum(tensor.numel() * tensor.element_size() for tensor in sae.buffers())
    assert held <= ONE <= held + 4 * 3 * F


def test_what_fits_is_loaded_at_once(folder):
    assert not load_saes(folder).is_lazy
    assert not load_saes(folder, budget=N * ONE).is_lazy
    assert load_saes(folder, budget=N * ONE - 1).is_lazy


def test_half_of_what_is_free_is_used(folder, monkeypatch):
    for free, lazy in ((2 * N * ONE, False), (2 * N * ONE - 2, True), (None, False)):
        monkeypatch.setattr(streaming, "free_memory", lambda device, free=free: free)
        assert load_saes(folder).is_lazy == lazy


def test_how_many_stay_is_told_beforehand(folder):
    for room, staying in ((2, 0), (3, 1), (5, 3)):
        assert load_saes(folder, budget=room * ONE).n_staying == staying
    assert load_saes(folder, budget=3 * ONE - 1).n_staying == 0


def test_streamed_are_the_same_and_in_order(folder):
    streamed, loaded = load_saes(folder, budget=2 * ONE), load_saes(folder)
    assert list(streamed) == list(loaded) == sites(*range(N)) and len(streamed) == N
    assert saes_fingerprint(streamed) == saes_fingerprint(loaded)
    for site, sae in streamed.items():
        assert torch.equal(sae.W_enc, loaded[site].W_enc)
        assert streamed.config(site) == loaded.config(site)
        assert torch.equal(streamed.bias(site), loaded.bias(site))
    assert streamed.device == loaded.device


@pytest.mark.parametrize("room", [2, 3, 5])
def test_memory_and_reads_over_several_rounds(folder, quick_gc, room):
    """At most `room` live, with the one a caller's loop still holds while the next is read; all but two stay."""
    streamed = load_saes(folder, budget=room * ONE)
    assert streamed.is_lazy
    alive: list[weakref.ref] = []
    most, sae = 0, None
    for _ in range(3):
        for site in streamed:
            held, sae = sae, streamed[site]
            assert streamed[site] is sae
            alive.append(weakref.ref(sae))
            gc.collect()
            most = max(most, len({id(found) for ref in alive if (found := ref()) is not None}))
    assert most == room and held is not sae
    assert streamed.n_reads == N + 2 * (N - (room - 2))


def test_the_last_one_is_let_go_before_the_next_is_read(quick_gc):
    config, refs, alive = SAEConfig("relu", D, F), [], []

    def read():
        gc.collect()
        alive.append(sum(ref() is not None for ref in refs))
        vectors, matrix = {"b_enc": torch.zeros(F), "b_dec": torch.zeros(D)}, torch.zeros(F, D)
        sae = SparseAutoencoder(config, {"W_enc": matrix, "W_dec": matrix, **vectors})
        refs.append(weakref.ref(sae))
        return sae

    streamed = SAEs.lazy({site: Source(read, config) for site in sites(0, 1, 2)}, device="cpu", budget=2 * ONE)
    for site in streamed:
        assert streamed[site].config == config
    assert alive == [0, 0, 0]


def test_biases_are_read_once(folder):
    streamed = load_saes(folder, budget=2 * ONE)
    assert streamed.is_lazy
    for _ in range(3):
        assert [float(streamed.bias(site)[0]) for site in streamed] == list(range(N))
    assert streamed.n_reads == N


def test_some_of_them(folder):
    streamed = load_saes(folder, budget=3 * ONE).subset(sites(4, 1))
    assert streamed.is_lazy and list(streamed) == sites(1, 4)
    assert list(load_saes(folder).subset(sites(4, 1))) == sites(1, 4)
    assert list(load_saes(folder, sites=["resid_2", "resid_0", "resid_3"], budget=2 * ONE)) == sites(0, 2, 3)


def test_too_little_memory_is_refused_with_what_is_needed(folder):
    with pytest.raises(UserError, match="must hold two autoencoders"):
        load_saes(folder, budget=2 * ONE - 1)


def test_other_formats_are_streamed(folder, tmp_path):
    loaded = load_saes(folder)
    other = tmp_path / "other"
    for site, sae in loaded.items():
        save_sae(sae, other / site.name, file_format="saelens")
    streamed = load_saes(other, budget=2 * ONE)
    assert streamed.is_lazy and list(streamed) == list(loaded)
    x = torch.randn(3, D)
    for site, sae in streamed.items():
        assert torch.allclose(sae(x), loaded[site](x), atol=1e-5)
    assert list(load_saes(other, sites=["resid_2", "resid_0", "resid_3"], budget=2 * ONE)) == sites(0, 2, 3)


def test_the_check_at_attachment_takes_them_one_by_one(tiny_model, tmp_path):
    width = tiny_model.d_model
    for site in tiny_model.sites:
        W_dec = torch.nn.functional.normalize(torch.randn(48, width), dim=-1)
        tensors = {"W_enc": W_dec.clone(), "b_enc": torch.zeros(48), "W_dec": W_dec, "b_dec": torch.zeros(width)}
        SparseAutoencoder(SAEConfig("relu", width, 48, site.name), tensors).save(tmp_path / site.name)
    streamed = load_saes(tmp_path, budget=2 * SAEConfig("relu", width, 48).n_bytes)
    assert streamed.is_lazy
    check_saes(tiny_model, streamed)
    assert streamed.n_reads == len(tiny_model.sites)


def test_free_memory_is_known_here():
    free = free_memory(torch.device("cpu"))
    assert free is None or 2**20 < free < 2**50
