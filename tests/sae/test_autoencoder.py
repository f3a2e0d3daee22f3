"""The autoencoder against loops written from the formulas, and its files."""

import json

import pytest
import torch

from sae.autoencoder import SAEConfig, SparseAutoencoder
from sae.errors import UserError
from sae.folding import fold_norms, fold_scale
from sae.model.sites import Site
from sae.saes import load_saes
from tests.near import assert_near

D, F, N, K = 6, 20, 17, 4
ARCHITECTURES = ["relu", "topk", "jumprelu", "batchtopk", "gated"]


def make_tensors(architecture, *, n_features=F, d=D, seed=0, unit=True):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    tensors = {"W_enc": normal(n_features, d), "b_enc": 0.1 * normal(n_features)}
    tensors |= {"W_dec": normal(n_features, d), "b_dec": normal(d)}
    if unit:
        tensors["W_dec"] /= tensors["W_dec"].norm(dim=1, keepdim=True)
    if architecture in ("jumprelu", "batchtopk"):
        tensors["threshold"] = normal(n_features).abs()
    if architecture == "gated":
        tensors["gate_bias"] = 0.3 * normal(n_features)
        tensors["magnitude"] = normal(n_features).exp()
    return tensors


def make_sae(architecture, *, subtract_b_dec=True, site="resid_0", **options):
    config = SAEConfig(architecture, D, F, site=site, subtract_b_dec=subtract_b_dec, k=K)
    return SparseAutoencoder(config, make_tensors(architecture, **options))


def loop_encode(sae, x):
    """Features of one token, one at a time, from the papers' formulas."""
    config, t = sae.config, dict(sae.named_buffers())
    centred = x - t["b_dec"] if config.subtract_b_dec else x
    f = torch.zeros(config.n_features)
    pre = [float(t["W_enc"][i] @ centred + t["b_enc"][i]) for i in range(config.n_features)]
    for i in range(config.n_features):
        if config.architecture == "relu":
            f[i] = max(pre[i], 0)
        elif config.architecture == "topk":
            f[i] = max(pre[i], 0) if sorted(pre, reverse=True).index(pre[i]) < config.k else 0
        elif config.architecture in ("jumprelu", "batchtopk"):
            f[i] = max(pre[i], 0) if pre[i] > t["threshold"][i] else 0
        elif config.architecture == "gated":
            pi = float(t["W_enc"][i] @ centred)
            f[i] = max(float(t["magnitude"][i]) * pi + float(t["b_enc"][i]), 0) if pi + t["gate_bias"][i] > 0 else 0
    return f


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("subtract_b_dec", [True, False])
def test_encode_decode_match_the_formulas(architecture, subtract_b_dec):
    sae = make_sae(architecture, subtract_b_dec=subtract_b_dec)
    x = torch.randn(N, D)
    f = torch.stack([loop_encode(sae, row) for row in x])
    assert (f > 0).any()
    assert_near(sae.encode(x), f)
    assert_near(sae(x), f @ sae.W_dec + sae.b_dec)
    assert_near(sae.encode(x.reshape(1, N, D))[0], f)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("chunk_rows", [1, 5, 100])
def test_encode_sparse_lists_the_nonzeros_of_encode(architecture, chunk_rows):
    sae = make_sae(architecture)
    x = torch.randn(N, D)
    sparse = sae.encode_sparse(x, chunk_bytes=4 * F * chunk_rows)
    token, feature = sae.encode(x).nonzero(as_tuple=True)
    assert torch.equal(sparse.token, token)
    assert torch.equal(sparse.feature, feature)
    assert_near(sparse.value, sae.encode(x)[token, feature])


def test_encode_sparse_of_no_tokens_is_empty():
    sparse = make_sae("topk").encode_sparse(torch.empty(0, D))
    assert [len(column) for column in sparse] == [0, 0, 0]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("chunk_bytes", [1, 2**20])
def test_some_features_and_the_reconstruction_chunk_by_chunk(architecture, chunk_bytes, monkeypatch):
    monkeypatch.setattr("sae.autoencoder.CHUNK_BYTES", chunk_bytes)
    sae, x = make_sae(architecture), torch.randn(3, 5, D)
    for index in (torch.tensor([7, 2, 11]), torch.tensor([], dtype=torch.long)):
        f, x_hat = sae.encode_and_reconstruct(x, index)
        assert_near(f, sae.encode(x)[..., index])
        assert_near(x_hat, sae(x))
        assert_near(sae.encode_some(x, index), f)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_encoder_rows_are_the_gradient_of_active_features(architecture):
    sae = make_sae(architecture)
    x = torch.randn(N, D, requires_grad=True)
    f = sae.encode(x)
    token, feature = f.nonzero(as_tuple=True)
    for t, i in list(zip(token.tolist(), feature.tolist(), strict=True))[:20]:
        (gradient,) = torch.autograd.grad(f[t, i], x, retain_graph=True)
        torch.testing.assert_close(gradient[t], sae.encoder_rows(torch.tensor([i]))[0])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_save_and_load_keep_outputs(architecture, tmp_path):
    sae = make_sae(architecture)
    sae.save(tmp_path / "resid_0")
    again = SparseAutoencoder.load(tmp_path / "resid_0")
    x = torch.randn(N, D)
    assert again.config == sae.config
    assert torch.equal(again(x), sae(x))
    assert {p.name for p in (tmp_path / "resid_0").iterdir()} == {"config.json", "sae.safetensors"}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_folding_a_scale_is_exact(architecture):
    tensors = make_tensors(architecture)
    config = SAEConfig(architecture, D, F, k=K)
    scale, x = 3.7, 5 * torch.randn(N, D)
    plain, folded = SparseAutoencoder(config, tensors), SparseAutoencoder(config, fold_scale(tensors, scale))
    assert_near(folded.encode(x), scale * plain.encode(x / scale))
    assert_near(folded(x), scale * plain(x / scale))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_folding_norms_keeps_reconstructions_and_makes_unit_rows(architecture):
    tensors = make_tensors(architecture, unit=False)
    tensors["W_dec"][3] = 0  # a row that stays zero
    config = SAEConfig(architecture, D, F, k=K)
    x = torch.randn(N, D)
    plain = SparseAutoencoder(config, tensors)
    folded = SparseAutoencoder(config, fold_norms(tensors, ranked=architecture == "topk"))
    assert_near(folded(x), plain(x))
    norms = folded.W_dec.norm(dim=1)
    assert norms[3] == 0
    torch.testing.assert_close(norms[norms > 0], torch.ones(F - 1))


def test_load_saes_in_forward_order_from_run_folder_or_saes_folder(tmp_path):
    for site in ("resid_1", "mlp_0", "embed", "attn_1"):
        make_sae("topk", site=site).save(tmp_path / "saes" / site)
    names = ["embed", "mlp_0", "attn_1", "resid_1"]
    for path in (tmp_path, tmp_path / "saes"):
        assert [str(site) for site in load_saes(path)] == names
    assert list(load_saes(tmp_path, sites=["mlp_0"])) == [Site.parse("mlp_0")]
    assert list(load_saes(tmp_path / "saes" / "embed")) == [Site.parse("embed")]
    with pytest.raises(UserError, match="resid_0"):
        load_saes(tmp_path, sites=["resid_0"])


def test_user_mistakes_are_named(tmp_path):
    with pytest.raises(UserError, match="no such path"):
        load_saes(tmp_path / "nowhere")
    with pytest.raises(UserError, match="looked for"):
        load_saes(tmp_path)
    with pytest.raises(UserError, match="did you mean 'topk'"):
        SparseAutoencoder(SAEConfig("topkk", D, F), {})
    tensors = make_tensors("relu")
    with pytest.raises(UserError, match=r"W_enc.*\(6, 20\).*\(20, 6\)"):
        SparseAutoencoder(SAEConfig("relu", D, F), tensors | {"W_enc": tensors["W_enc"].T})
    with pytest.raises(UserError, match="threshold"):
        SparseAutoencoder(SAEConfig("jumprelu", D, F), tensors)
    with pytest.raises(UserError, match="k of site"):
        SparseAutoencoder(SAEConfig("topk", D, F, k=F + 1), tensors)


def test_a_newer_schema_is_refused(tmp_path):
    folder = make_sae("relu").save(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"schema_version": 99}))
    with pytest.raises(UserError, match="99"):
        SparseAutoencoder.load(folder)


@pytest.mark.parametrize("architecture", ["jumprelu", "gated"])
def test_on_its_threshold_a_feature_is_not_active(architecture):
    """H(0) = 0: z must exceed the threshold, and the gate zero."""
    tensors = {"W_enc": torch.eye(2), "W_dec": torch.eye(2), "b_dec": torch.zeros(2)}
    if architecture == "jumprelu":
        tensors |= {"b_enc": torch.zeros(2), "threshold": torch.full((2,), 0.5)}
    else:
        tensors |= {"b_enc": torch.ones(2), "gate_bias": torch.full((2,), -0.5), "magnitude": torch.ones(2)}
    sae = SparseAutoencoder(SAEConfig(architecture, 2, 2, subtract_b_dec=False), tensors)
    f = sae.encode(torch.tensor([[0.5, 0.5 + 2**-20]]))
    assert f[0, 0] == 0.0 and f[0, 1] > 0.5


def test_fewer_than_k_positive_features_are_active_alone():
    tensors = {"W_enc": torch.eye(3), "b_enc": torch.zeros(3), "W_dec": torch.eye(3), "b_dec": torch.zeros(3)}
    sae, x = SparseAutoencoder(SAEConfig("topk", 3, 3, k=2), tensors), torch.tensor([[1.0, -2.0, -3.0]])
    assert sae.encode(x).tolist() == [[1.0, 0.0, 0.0]]
    assert sae.encode_sparse(x).feature.tolist() == [0]


def test_a_folder_with_a_config_alone_is_no_autoencoder(tmp_path):
    make_sae("relu").save(tmp_path / "saes" / "resid_0")
    (tmp_path / "saes" / "resid_1").mkdir()
    (tmp_path / "saes" / "resid_1" / "config.json").write_text('{"schema_version": 1, "site": "resid_1"}')
    assert list(load_saes(tmp_path)) == [Site("resid", 0)]
