"""Every architecture's sparse step against plain dense autograd of its paper's loss, and selection against sorting."""

from dataclasses import replace

import pytest
import torch

from sae.architectures import ARCHITECTURES, architecture
from sae.architectures.base import Hyper
from sae.architectures.matryoshka import prefix_ends
from sae.autoencoder import SAEConfig, SparseAutoencoder
from sae.errors import UserError
from sae.sparse import encoder_pass
from sae.sparse.activations import SparseActs, stable_order
from sae.sparse.encoder_pass import Workspace, above, batch_top_k, row_chunks, top_k
from tests.near import assert_near

N, D, F, K = 37, 12, 48, 5
TRAINED = [name for name in ARCHITECTURES if name != "identity"]
PENALISED = ["relu", "relu_unit", "p_anneal", "jumprelu", "gated"]
HYPER = Hyper(k=K, sparsity=0.03, p=0.6, bandwidth=0.3, k_aux=0)


def make_weights(name, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    tensors = {"W_enc": normal(F, D), "b_enc": 0.3 * normal(F), "W_dec": normal(F, D) / D**0.5, "b_dec": normal(D)}
    extra = architecture(name).extra_weights(F)
    tensors |= {key: value + 0.3 * normal(F).abs() for key, value in extra.items()}
    return {key: value.requires_grad_() for key, value in tensors.items()}


def make_x(seed=1):
    return torch.randn(N, D, generator=torch.Generator().manual_seed(seed))


def rectangle(u):
    return (u.abs() < 0.5).float()


def twin_loss(name, x, w, hyper):
    """(loss averaged over tokens, features) written densely from the paper; autograd gives its gradients."""
    arch = architecture(name)
    b_dec, W_dec = w["b_dec"], w["W_dec"]
    z = (x - b_dec if arch.subtract_b_dec else x) @ w["W_enc"].T + (0 if name == "gated" else w["b_enc"])

    def error(f, W=W_dec, b=b_dec):
        return (x - f @ W - b).pow(2).sum(1).mean()

    def keep_top(z, k):
        return z.relu() * (z >= z.topk(k, dim=1).values[:, -1:])

    if name == "topk":
        f = keep_top(z, hyper.k)
        return error(f), f
    if name == "multi_topk":
        f = keep_top(z, hyper.k)
        return error(f) + error(keep_top(z, 4 * hyper.k)) / 8, f
    if name in ("batchtopk", "matryoshka"):
        f = z.relu() * (z >= z.flatten().sort(descending=True).values[hyper.k * N - 1])
        if name == "batchtopk":
            return error(f), f
        masks = [torch.arange(F) < end for end in [*prefix_ends(F), F]]
        return sum(error(f * mask) for mask in masks) / len(masks), f
    if name == "relu":
        f = z.relu()
        return error(f) + hyper.sparsity * (f * W_dec.norm(dim=1)).sum(1).mean(), f
    if name == "relu_unit":
        f = z.relu()
        return error(f) + hyper.sparsity * f.sum(1).mean(), f
    if name == "p_anneal":
        f = z.relu()
        return error(f) + hyper.sparsity * f[f > 1e-3].pow(hyper.p).sum() / N, f
    if name == "gated":
        gate = (z + w["gate_bias"]).relu()
        f = (gate > 0) * (w["r"].exp() * z + w["b_enc"]).relu()
        frozen = error(gate, W_dec.detach(), b_dec.detach())
        return error(f) + hyper.sparsity * gate.sum(1).mean() + frozen, f
    if name == "jumprelu":
        theta, eps = w["threshold"], hyper.bandwidth
        step = (z > theta).float()
        window = rectangle((z - theta) / eps).detach()
        # the value of the step and its pseudo-derivative with respect to theta
        step = step + (-window / eps * theta) - (-window / eps * theta).detach()
        f = z * (z > theta)
        jump = -theta.detach() / eps * window * theta
        f = f + jump - jump.detach()
        l0 = step.sum(1)
        penalty = l0 if hyper.target_l0 is None else (l0 / hyper.target_l0 - 1).pow(2)
        return error(f) + hyper.sparsity * penalty.mean(), f
    raise AssertionError(name)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Several row chunks even in these small batches."""
    monkeypatch.setattr("sae.sparse.encoder_pass.CPU_CHUNK_BYTES", 4 * F * 10)
    monkeypatch.setattr("sae.sparse.encoder_pass.MIN_CHUNK_ROWS", 1)
    monkeypatch.setattr("sae.architectures.base.DENSE_CHUNK_BYTES", 4 * F * 10)


def own_step(name, *, dense=False, dead=None, hyper=HYPER, x=None, workspace=None):
    w = make_weights(name)
    state = architecture(name).extra_state()
    x = make_x() if x is None else x
    stats = architecture(name).step(x, w, hyper, state, dead=dead, dense=dense, workspace=workspace)
    return w, stats, state


def assert_same_gradients(mine, twin):
    for key in twin:
        expected = torch.zeros_like(twin[key]) if twin[key].grad is None else twin[key].grad
        assert_near(mine[key].grad, expected, msg=key)


@pytest.mark.parametrize(("name", "dense"), [(name, False) for name in TRAINED] + [(name, True) for name in PENALISED])
def test_gradients_and_statistics_are_those_of_dense_autograd(name, dense):
    x = make_x()
    mine, stats, _ = own_step(name, dense=dense)
    twin = make_weights(name)
    loss, f = twin_loss(name, x, twin, HYPER)
    loss.backward()
    assert_same_gradients(mine, twin)
    torch.testing.assert_close(stats.fired, (f > 0).sum(0).float())
    assert_near(stats.squared_error, (x - f @ twin["W_dec"] - twin["b_dec"]).pow(2).sum())
    assert_near(stats.loss / N, loss)


@pytest.mark.parametrize("name", ["topk", "multi_topk", "batchtopk", "matryoshka"])
def test_what_is_selected_but_negative_is_not_active(name):
    """k of a token, or k N of the batch, are more than there are positive pre-activations."""
    x, hyper = make_x() - 1.0, replace(HYPER, k=11)
    mine, twin = make_weights(name), make_weights(name)
    for w in (mine, twin):
        w["b_enc"].data -= 8.0
    stats = architecture(name).step(x, mine, hyper, architecture(name).extra_state())
    loss, f = twin_loss(name, x, twin, hyper)
    loss.backward()
    assert 0 < (f > 0).sum() < 11 * N / 2
    assert_same_gradients(mine, twin)
    torch.testing.assert_close(stats.fired, (f > 0).sum(0).float())


@pytest.mark.parametrize("name", TRAINED)
def test_what_is_exported_encodes_as_the_step_did(name):
    w, _, state = own_step(name)
    _, f = twin_loss(name, make_x(), w, HYPER)
    config = SAEConfig(name, D, F, subtract_b_dec=architecture(name).subtract_b_dec, k=K)
    found = SparseAutoencoder(config, architecture(name).export(w, state)).encode(make_x())
    missed = (found - f).abs() > 1e-4
    of_all = name in ("batchtopk", "matryoshka")
    assert missed.sum() <= (1 if of_all else 0)  # the smallest of all is the threshold, and may round above it
    assert not found[missed].any()


@pytest.mark.parametrize("dense", [False, True])
def test_gradients_of_two_steps_add_up(dense):
    w, states = make_weights("relu"), architecture("relu").extra_state()
    for seed in (1, 2):
        architecture("relu").step(make_x(seed), w, HYPER, states, dense=dense)
    twin = make_weights("relu")
    sum(twin_loss("relu", make_x(seed), twin, HYPER)[0] for seed in (1, 2)).backward()
    assert_same_gradients(w, twin)


def test_a_fixed_weight_is_rescaled_so_that_the_annealed_penalty_does_not_jump():
    w, x, later = make_weights("p_anneal"), make_x(), replace(HYPER, p=0.3)
    factor = architecture("p_anneal").rescaling(x, w, HYPER, later)
    f = ((x - w["b_dec"]) @ w["W_enc"].T + w["b_enc"]).relu()
    before, after = f.pow(0.6).sum(), f[f > 0].pow(0.3).sum()
    assert after < 0.95 * before
    torch.testing.assert_close(factor * after, before)
    assert architecture("p_anneal").rescaling(x - 1e6 * w["W_enc"].sum(0), w, HYPER, HYPER) == 1.0
    assert architecture("relu").rescaling(x, w, HYPER, later) == 1.0


@pytest.mark.parametrize("threshold", [-0.2, 0.2])
def test_thresholds_stay_positive(threshold):
    w = make_weights("jumprelu")
    w["threshold"].data.fill_(threshold)
    with torch.no_grad():
        architecture("jumprelu").constrain(w)
    assert (w["threshold"] == max(threshold, 0.0)).all()


def test_prefixes_double():
    assert prefix_ends(48) == [3, 6, 12, 24]
    assert prefix_ends(4) == [1, 2]  # a quarter and a half: less than one feature is no prefix


@pytest.mark.parametrize("dense", [False, True])
def test_jumprelu_with_a_target_has_the_gradients_of_the_quadratic_penalty(dense):
    x, hyper = make_x(), replace(HYPER, target_l0=4.0)
    mine, stats, _ = own_step("jumprelu", dense=dense, hyper=hyper)
    twin = make_weights("jumprelu")
    loss, _ = twin_loss("jumprelu", x, twin, hyper)
    loss.backward()
    assert_same_gradients(mine, twin)
    assert_near(stats.loss / N, loss)


def test_steps_that_share_buffers_do_not_see_each_other():
    workspace = Workspace()
    for name in TRAINED:
        for dense in (False, True) if name in PENALISED else (False,):
            alone, stats, _ = own_step(name, dense=dense)
            sharing, shared_stats, _ = own_step(name, dense=dense, workspace=workspace)
            assert torch.equal(stats.fired, shared_stats.fired)
            for key, weight in alone.items():
                assert weight.grad is None or torch.equal(weight.grad, sharing[key].grad), (name, dense, key)
    assert workspace.n_bytes == 4 * 10 * F  # ten rows


def test_chunks_are_equally_long_and_within_their_budget(monkeypatch):
    monkeypatch.setattr("sae.sparse.encoder_pass.CPU_CHUNK_BYTES", 4 * F * 16)
    chunks = list(row_chunks(N, F, torch.device("cpu")))
    assert [(c.start, c.stop) for c in chunks] == [(0, 13), (13, 26), (26, 37)]


@pytest.mark.parametrize(("name", "dense"), [("topk", False), ("relu", False), ("relu", True), ("gated", True)])
def test_autocast_changes_products_only(name, dense):
    exact, exact_stats, _ = own_step(name, dense=dense)
    with torch.autocast("cpu", torch.bfloat16):
        cast, stats, _ = own_step(name, dense=dense)
    torch.testing.assert_close(stats.loss, exact_stats.loss, rtol=0.02, atol=0.0)
    for key in exact:
        assert cast[key].grad.dtype == torch.float32
        if name != "topk":  # there rounding may change what is selected
            error = (cast[key].grad - exact[key].grad).norm() / exact[key].grad.norm().clamp(min=1e-6)
            assert error < 0.03, key


@pytest.mark.parametrize("name", ["topk", "batchtopk", "jumprelu"])
def test_auxk_adds_the_gradient_of_the_papers_loss(name):
    dead, hyper = torch.tensor([3, 8, 20, 21, 40]), Hyper(k=K, sparsity=0.03, bandwidth=0.3, k_aux=3, aux_alpha=0.25)
    mine, _, _ = own_step(name, dead=dead, hyper=hyper)
    twin, x = make_weights(name), make_x()
    loss, f = twin_loss(name, x, twin, hyper)
    error = (x - f @ twin["W_dec"] - twin["b_dec"]).detach()
    x_c = x - twin["b_dec"] if architecture(name).subtract_b_dec else x
    z = (x_c @ twin["W_enc"].T + twin["b_enc"])[:, dead]
    f_dead = z.relu() * (z >= z.topk(3, dim=1).values[:, -1:])
    e_hat = f_dead @ twin["W_dec"][dead]
    aux = (error - e_hat).pow(2).sum(1).mean() / (error - error.mean(0)).pow(2).sum(1).mean()
    (loss + 0.25 * aux).backward()
    assert_same_gradients(mine, twin)


def test_auxk_is_of_the_first_tokens_alone(monkeypatch):
    """Chunks have ten rows, so the second one is cut."""
    monkeypatch.setattr("sae.sparse.encoder_pass.AUX_TOKENS", 14)
    dead, hyper = torch.tensor([3, 8, 20, 21, 40]), Hyper(k=K, k_aux=9, aux_alpha=0.25)  # 9 are more than are dead
    mine, _, _ = own_step("topk", dead=dead, hyper=hyper)
    twin, x = make_weights("topk"), make_x()
    loss, f = twin_loss("topk", x, twin, hyper)
    error = (x - f @ twin["W_dec"] - twin["b_dec"]).detach()[:14]
    z = ((x - twin["b_dec"]) @ twin["W_enc"].T + twin["b_enc"])[:14, dead]
    aux = (error - z.relu() @ twin["W_dec"][dead]).pow(2).sum() / (error - error.mean(0)).pow(2).sum()
    (loss + 0.25 * aux).backward()
    assert_same_gradients(mine, twin)


def test_batchtopk_threshold_is_the_mean_of_the_smallest_kept_activations():
    arch, w = architecture("batchtopk"), make_weights("batchtopk")
    state, smallest = arch.extra_state(), []
    for seed in range(5):
        x = make_x(seed)
        arch.step(x, w, HYPER, state)
        z = (x - w["b_dec"]) @ w["W_enc"].T + w["b_enc"]
        smallest.append(z.flatten().sort(descending=True).values[K * N - 1])
    torch.testing.assert_close(state["threshold"], torch.stack(smallest).mean(), atol=1e-5, rtol=1e-5)
    assert torch.equal(arch.export(w, state)["threshold"], state["threshold"].expand(F))


@pytest.mark.parametrize("n_features", [1, 7, 8, 48, 64])
def test_above_lists_every_entry_over_the_bound_in_token_order(n_features):
    z = torch.randn(20, n_features)
    z[3], z[4] = 0.3, 0.3  # not over it; the second in a group with larger ones
    z[4, -1] = 1.0
    acts = above(z, 0.3)
    listed = torch.zeros_like(z, dtype=torch.bool)
    listed[acts.token, acts.feature] = True
    assert torch.equal(listed, z > 0.3)
    assert torch.equal(acts.z, z[acts.token, acts.feature])
    assert torch.equal(acts.token, acts.token.sort().values)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("k", [1, 4, 30])
def test_batch_selection_is_exact_also_when_the_first_chunk_misleads(seed, k):
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(64, 128, generator=generator)
    z[:16] *= 10  # the bound read from the first chunk is far too high
    chosen = batch_top_k(lambda: z.split(16), k)
    expected = z.flatten().sort(descending=True).values[: k * len(z)]
    assert torch.equal(chosen.z.sort(descending=True).values, expected[expected > 0])
    assert torch.equal(z[chosen.token, chosen.feature], chosen.z)


def test_one_pass_selects_a_batch_whose_chunks_are_alike():
    z = torch.randn(512, 256, generator=torch.Generator().manual_seed(0))
    passes = iter([z.split(128)])  # the second would end in StopIteration
    assert len(batch_top_k(lambda: next(passes), 8).z) == 8 * 512


@pytest.mark.parametrize(("k", "lift"), [(8, 0.0), (60, 9.0)])
def test_a_batch_with_fewer_positive_entries_than_wanted_gives_those(k, lift):
    """Within two passes, also where the first chunk is lifted and sets a bound that is too high."""
    z = torch.randn(64, 128, generator=torch.Generator().manual_seed(0)) - 2
    z[:16] += lift
    assert (z > 0).sum() < k * 64
    passes = iter([z.split(16)] * 2)
    assert torch.equal(batch_top_k(lambda: next(passes), k).z.sort().values, z[z > 0].sort().values)


@pytest.mark.parametrize("n", [40, 2**16, 2**16 + 2])
def test_order_is_stable_also_for_many_values(n):
    index = torch.tensor([n - 1, 3, n - 1, 0, 3, n - 2])
    assert stable_order(index, n).tolist() == [3, 1, 4, 5, 0, 2]


@pytest.mark.parametrize("group", [encoder_pass.GROUP, encoder_pass.CUDA_GROUP])
@pytest.mark.parametrize("n_features", [6, 50, 64, 96, 256, 512])
def test_top_k_keeps_the_largest(n_features, group, monkeypatch):
    monkeypatch.setattr(encoder_pass, "GROUP", group)
    z = torch.randn(9, n_features)
    value, feature = top_k(z, 6)
    assert torch.equal(value.sort(descending=True).values, z.sort(descending=True).values[:, :6])
    assert torch.equal(z.gather(1, feature), value)


def test_empty_activations_decode_to_zero_and_have_zero_gradients():
    index = torch.empty(0, dtype=torch.int64)
    acts = SparseActs(index, index, torch.empty(0), n_tokens=3, n_features=F)
    W_enc, b_enc = torch.randn(F, D, requires_grad=True), torch.zeros(F, requires_grad=True)
    W_dec = torch.randn(F, D, requires_grad=True)
    z = acts.encode(W_enc, b_enc, None, torch.randn(3, D))
    out = acts.decode(z, W_dec)
    assert torch.equal(out, torch.zeros(3, D))
    out.square().sum().backward()
    assert all(torch.equal(w.grad, torch.zeros_like(w)) for w in (W_enc, b_enc, W_dec))


def test_sparse_activations_of_everything_sum_expand_and_decode_like_the_matrix():
    z = torch.randn(N, F)
    acts = above(z, -100.0)
    token, feature, value = acts.token, acts.feature, acts.z
    parameter, W_dec = torch.randn(F), torch.randn(F, D)
    torch.testing.assert_close(acts.sum_tokens(value), z.sum(0))
    torch.testing.assert_close(acts.decode(value, W_dec), z @ W_dec, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(acts.expand(parameter), parameter.expand(N, F)[token, feature])


def test_unknown_architecture_names_the_nearest():
    with pytest.raises(UserError, match="did you mean 'jumprelu'"):
        architecture("jumpreluu")
