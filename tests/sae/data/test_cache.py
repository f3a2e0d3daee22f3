"""Sweeps and activation caches give what single runs on the model give."""

import copy
import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from sae.autoencoder import SparseAutoencoder
from sae.data import cache_writer
from sae.data.activations import ContextStream, ModelActivations
from sae.data.cache import CachedActivations
from sae.data.cache_writer import write_cache
from sae.data.text import TextSource
from sae.errors import UserError
from sae.model.language_model import LanguageModel
from sae.model.sites import Site
from sae.saes import load_saes
from sae.training.config import TrainConfig
from sae.training.sweep import grid, sweep
from sae.training.train import train_saes

TEXTS = [
    "the man sees the dog",
    "she walks near the old cat .",
    "kings know queens",
    "a boy sings",
    "he was happy",
] * 50
SITES = [Site.parse("resid_0"), Site.parse("mlp_1")]
CONFIG = TrainConfig(features=24, k=3, tokens=6000, batch_size=512, log_steps=4, checkpoints=1)


def test_a_grid_names_every_combination():
    configs = grid(CONFIG, architectures=("topk", "identity"), features=(16, 32), k=(2, 4), seeds=(0, 1))
    assert len(configs) == 9
    assert configs["topk-32-k4-seed1"].features == 32
    assert {"identity", "topk-16-k2-seed0"} <= set(configs)
    assert all(config.tokens == 6000 for config in configs.values())


@pytest.mark.slow
def test_a_sweep_trains_each_config_as_a_run_of_its_own_does(tiny_model, tmp_path):
    config = replace(CONFIG, tokens=3000)
    configs = grid(config, architectures=("relu", "topk", "identity"), features=(24,), k=(3,), seeds=(0, 1))
    done = sweep(tiny_model, TEXTS, configs, sites=["resid_0", "mlp_1"], out=tmp_path / "sweep", progress=False)
    saes = {name: load_saes(done.run(name)) for name in configs}
    alone = train_saes(
        tiny_model,
        TEXTS,
        sites=["resid_0", "mlp_1"],
        config=configs["relu-24-k3-seed1"],
        out=tmp_path / "one",
        progress=False,
    )
    for site in SITES:
        for name, tensor in alone[site].named_buffers():
            assert torch.equal(tensor, saes["relu-24-k3-seed1"][site].get_buffer(name))
    assert all(set(found) == set(SITES) for found in saes.values())
    x = torch.randn(5, 32)
    torch.testing.assert_close(saes["identity"][SITES[0]](x), x)
    logs = [tmp_path / folder / "saes" / "training.jsonl" for folder in ("sweep/relu-24-k3-seed1", "one")]
    rows = [[json.loads(line) | {"tokens_per_second": 0} for line in log.read_text().splitlines()] for log in logs]
    assert rows[0] == rows[1]
    assert {path.name for path in (tmp_path / "sweep").iterdir()} == {"config.json", *configs}


def test_configs_of_a_sweep_share_their_data(tiny_model, tmp_path):
    configs = {"a": CONFIG, "b": TrainConfig(features=24, k=3, tokens=7000, batch_size=512, log_steps=4)}
    with pytest.raises(UserError, match=r"tokens is 7000 in 'b' and 6000 in 'a'"):
        sweep(tiny_model, TEXTS, configs, out=tmp_path)


@pytest.fixture
def cache(tiny_model, tmp_path):
    options = {"sites": ["resid_0", "mlp_1"], "tokens": 900, "shard_tokens": 700, "progress": False}
    write_cache(tiny_model, TEXTS, out=tmp_path / "cache", dtype="float32", **options)
    return tmp_path / "cache"


def test_a_cache_holds_what_the_model_gives(tiny_model, cache):
    cached = CachedActivations(cache, model=tiny_model, sites=SITES, text=TextSource.of(TEXTS))
    assert sum(cached.manifest.shards) >= 900 and len(cached.manifest.shards) > 1
    stream = ContextStream(tiny_model, TextSource.of(TEXTS))
    direct = ModelActivations(tiny_model, stream, SITES)
    expected = {site: torch.zeros(700, 32) for site in SITES}
    n = direct.fill(expected)
    found = {site: torch.zeros(n, 32) for site in SITES}
    cached.fill(found)
    assert all(torch.equal(found[site], expected[site][:n]) for site in SITES)


def test_a_cache_is_read_over_shards_and_round_again(cache):
    cached, total = CachedActivations(cache), sum(CachedActivations(cache).manifest.shards)
    whole = {site: torch.zeros(total, 32) for site in cached.widths}
    assert cached.fill(whole) == total
    assert (cached.position().epoch, cached.position().documents) == (1, 0)
    cached = CachedActivations(cache)
    pieces = []
    for _ in range(9):
        piece = {site: torch.zeros(total // 3, 32) for site in cached.widths}
        cached.fill(piece)
        pieces.append(piece[SITES[0]])
    rows = torch.cat(pieces)
    torch.testing.assert_close(rows, whole[SITES[0]].repeat(4, 1)[: len(rows)])


@pytest.mark.slow
def test_training_from_a_cache_learns_the_same_as_from_the_model(tiny_model, cache, tmp_path):
    saes = train_saes(
        tiny_model, TEXTS, sites=["resid_0"], config=CONFIG, out=tmp_path / "run", progress=False,
        activations=CachedActivations(cache, model=tiny_model, sites=SITES[:1]),
    )  # fmt: skip
    direct = train_saes(tiny_model, TEXTS, sites=["resid_0"], config=CONFIG, out=tmp_path / "direct", progress=False)
    tokens = tiny_model.tokenize(TEXTS[:5])
    x = tiny_model.run(tokens, capture=SITES).activations[SITES[0]][tokens.attention_mask.bool()]
    errors = [(x - sae[SITES[0]](x)).square().sum() / (x - x.mean(0)).square().sum() for sae in (saes, direct)]
    assert errors[0] == pytest.approx(errors[1].item(), rel=0.2)
    assert errors[1] < 0.5


def test_a_cache_for_something_else_is_refused(make_tiny_model, cache, tmp_path):
    with pytest.raises(UserError, match="was made for model"):
        CachedActivations(cache, model=make_tiny_model("gpt_neox", seed=3))
    with pytest.raises(UserError, match=r"has not all of these sites.*mlp_0"):
        CachedActivations(cache, sites=[Site.parse("mlp_0")])
    with pytest.raises(UserError, match="was made for text"):
        CachedActivations(cache, text="other.txt")
    shutil.copytree(cache, tmp_path / "partial")
    (tmp_path / "partial" / "manifest.json").unlink()
    with pytest.raises(UserError, match="no activation cache"):
        CachedActivations(tmp_path / "partial")
    (cache / "shard_00001.safetensors").unlink()
    with pytest.raises(UserError, match=r"shard_00001.safetensors' is missing or damaged"):
        CachedActivations(cache).fill({site: torch.zeros(900, 32) for site in SITES})


def test_a_cache_knows_where_its_sites_are(make_tiny_model, tmp_path):
    usual = make_tiny_model("llama")
    path = "model.layers.1.self_attn.o_proj:input"
    moved = LanguageModel(usual.hf, usual.tokenizer, name="m", site_paths={"attn_1": path})
    write_cache(moved, TEXTS, sites="attn", tokens=300, out=tmp_path / "cache", progress=False)
    cached = CachedActivations(tmp_path / "cache", model=moved)
    CachedActivations(tmp_path / "cache", model=usual, sites="attn_0")
    with pytest.raises(UserError, match=r"has site attn_1 from model.layers.1.self_attn.o_proj:input"):
        CachedActivations(tmp_path / "cache", model=usual)
    config = replace(CONFIG, tokens=512)
    saes = train_saes(
        cached.model, cached.text, activations=cached, config=config, out=tmp_path / "run", progress=False
    )
    assert [sae.config.extra["site_path"] for sae in saes.values()] == ["", path]


def test_a_text_file_that_changed_is_another_text(tiny_model, tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("\n".join(TEXTS))
    write_cache(tiny_model, path, sites="resid_0", tokens=300, out=tmp_path / "cache", progress=False)
    (tmp_path / "copy.txt").write_text(path.read_text())
    CachedActivations(tmp_path / "cache", text=tmp_path / "copy.txt")
    path.write_text("\n".join(TEXTS[::-1]))
    with pytest.raises(UserError, match=r"not '.*text.txt' as it is now"):
        CachedActivations(tmp_path / "cache", text=path)


def test_an_interrupted_cache_goes_on_to_the_same_files(tiny_model, tmp_path, monkeypatch):
    """Also with documents packed, where tokens wait for the next context."""
    options = {"sites": "resid_0", "tokens": 900, "shard_tokens": 350, "progress": False, "packed": True}
    write_cache(tiny_model, TEXTS, out=tmp_path / "whole", **options)
    write = cache_writer.write_tensors

    def full(path, tensors, **options):
        if path.name == "shard_00001.safetensors":
            raise UserError("no space left on the device")
        write(path, tensors, **options)

    out = tmp_path / "cache"
    monkeypatch.setattr(cache_writer, "write_tensors", full)
    with pytest.raises(UserError, match="no space"):
        write_cache(tiny_model, TEXTS, out=out, **options)
    monkeypatch.setattr(cache_writer, "write_tensors", write)
    with pytest.raises(UserError, match=r"is not finished \(\d+ tokens\): go on"):
        CachedActivations(out)
    with pytest.raises(UserError, match="not empty"):
        write_cache(tiny_model, TEXTS, out=out, **options)
    with pytest.raises(UserError, match=r"begun with tokens 900 and cannot go on with 800"):
        write_cache(tiny_model, TEXTS, out=out, resume=True, **options | {"tokens": 800})
    halved = LanguageModel(copy.deepcopy(tiny_model.hf).bfloat16(), tiny_model.tokenizer, name="m")
    with pytest.raises(UserError, match="begun with a model in float32 and cannot go on with one in bfloat16"):
        write_cache(halved, TEXTS, out=out, resume=True, **options)
    first = (out / "shard_00000.safetensors").stat().st_mtime_ns
    manifest = write_cache(tiny_model, TEXTS, out=out, resume=True, **options)
    assert (out / "shard_00000.safetensors").stat().st_mtime_ns == first and len(manifest.shards) > 2
    assert {p.name: p.read_bytes() for p in out.iterdir()} == {
        p.name: p.read_bytes() for p in (tmp_path / "whole").iterdir()
    }


@pytest.mark.parametrize(("dtype", "expected"), [("bfloat16", torch.bfloat16), ("float16", torch.float16)])
def test_what_a_shard_and_the_manifest_hold(make_tiny_model, tmp_path, dtype, expected):
    model = make_tiny_model("gpt_neox")
    model.hf.config._commit_hash = "0123abcd"
    manifest = write_cache(model, TEXTS, sites="resid_0", tokens=60, out=tmp_path, dtype=dtype, progress=False)
    assert (manifest.revision, manifest.dtype) == ("0123abcd", dtype)
    shard = load_file(tmp_path / "shard_00000.safetensors")
    assert (shard["resid_0"].dtype, shard["input_ids"].dtype) == (expected, torch.int32)
    stream = ContextStream(model, TextSource.of(TEXTS))
    tokens = stream.take()
    x = model.run(tokens, capture=[SITES[0]]).activations[SITES[0]][tokens.attention_mask.bool()]
    ids = tokens.input_ids[tokens.attention_mask.bool()]
    n = min(len(ids), len(shard["input_ids"]))
    assert torch.equal(shard["input_ids"][:n], ids[:n].int())
    assert torch.equal(shard["resid_0"][:n], x[:n].to(expected))


def test_a_cache_goes_on_with_nothing_but_what_it_was_begun_with(tiny_model, make_tiny_model, tmp_path, monkeypatch):
    options = {"sites": "resid_0", "tokens": 900, "shard_tokens": 350, "progress": False, "resume": True}
    with monkeypatch.context() as patch:
        patch.setattr(cache_writer, "_finish", lambda *_: None)
        write_cache(tiny_model, TEXTS, out=tmp_path, **options)
    other = make_tiny_model("gpt_neox", seed=3)
    for model, texts, change in (
        (tiny_model, TEXTS[::-1], {}), (other, TEXTS, {}), (tiny_model, TEXTS, {"dtype": "float32"}),
        (tiny_model, TEXTS, {"sites": "mlp_1"}), (tiny_model, TEXTS, {"context_length": 8}),
    ):  # fmt: skip
        with pytest.raises(UserError, match="was begun with"):
            write_cache(model, texts, out=tmp_path, **options | change)
    write_cache(tiny_model, TEXTS, out=tmp_path, **options)


def test_a_cache_holds_no_text_twice(tiny_model, tmp_path):
    manifest = write_cache(tiny_model, TEXTS, sites="resid_0", tokens=10**5, out=tmp_path, progress=False)
    words = sum(len(text.split()) for text in TEXTS)
    assert manifest.rows == words and manifest.whole_text and manifest.documents == len(TEXTS)


def test_a_cache_too_large_for_the_disk_is_refused_before_any_work(tiny_model, tmp_path):
    with pytest.raises(UserError, match=r"needs 1088000000.00 GB"):
        write_cache(tiny_model, TEXTS, sites="resid_0", tokens=16 * 10**15, out=tmp_path / "cache", progress=False)
    assert not (tmp_path / "cache").exists()


def test_training_from_a_cache_needs_no_model(cache, tmp_path):
    cached = CachedActivations(cache)
    options = {"config": CONFIG, "out": tmp_path / "run", "progress": False}
    train_saes(cached.model, cached.text, activations=cached, **options)
    assert set(load_saes(tmp_path / "run")) == set(SITES)
    with pytest.raises(UserError, match="known from a cache alone"):
        train_saes(cached.model, cached.text, **options | {"out": tmp_path / "other"})
    with pytest.raises(UserError, match="context_length 64, not 16"):
        train_saes(
            cached.model, cached.text, activations=cached, **options | {"config": replace(CONFIG, context_length=16)}
        )


@pytest.mark.slow
def test_a_sweep_goes_on_where_it_was_and_grows(tiny_model, tmp_path, monkeypatch):
    """Interrupted, finished, then with a second width: nothing is trained twice, all to the bits of a whole one."""
    config = replace(CONFIG, tokens=2000)
    small = grid(config, features=(16,), k=(2,), seeds=(0, 1))
    large = grid(config, features=(16, 24), k=(2,), seeds=(0, 1))
    options = {"sites": "resid_0", "progress": False}
    sweep(tiny_model, TEXTS, large, out=tmp_path / "whole", **options)
    save, out = SparseAutoencoder.save, tmp_path / "sweep"

    def dies(self, folder, **options):
        if "seed1" in str(folder):
            raise KeyboardInterrupt
        return save(self, folder, **options)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(SparseAutoencoder, "save", dies)
        sweep(tiny_model, TEXTS, small, out=out, **options)
    with pytest.raises(UserError, match=r"begun with config .* cannot be resumed"):
        sweep(tiny_model, TEXTS, large, out=out, resume=True, **options)
    assert set(sweep(tiny_model, TEXTS, small, out=out, resume=True, **options).configs) == set(small)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("sae.safetensors")}
    grown = sweep(tiny_model, TEXTS, large, out=out, resume=True, **options)
    assert set(grown.configs) == set(large) and len(before) == 2
    assert {path: path.stat().st_mtime_ns for path in before} == before
    for name in large:
        files = [root / name / "saes" / "resid_0" / "sae.safetensors" for root in (tmp_path / "whole", out)]
        assert files[0].read_bytes() == files[1].read_bytes()
