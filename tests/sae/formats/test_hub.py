"""Hub paths, against a local folder laid out like a repository: the hub's two functions are replaced, nothing else."""

import fnmatch
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import (
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from safetensors.torch import save_file

from sae.errors import UserError
from sae.formats import load_sae
from sae.formats import locate as hub
from sae.formats.locate import choose, local_path
from sae.formats.releases import released, repository_of
from sae.formats.site_names import dictionary_learning_name, hook_site, site_named, transformer_lens_hook
from sae.model.sites import Site
from sae.saes import load_saes
from tests.sae.formats.test_recorded import RECORDED


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """`someone/saes` with sparsify folders, a readme and a file that must not be downloaded; records what is."""
    root, cache, calls = tmp_path / "hub", tmp_path / "cache", []
    for name in ("layers.3", "layers.3.mlp"):
        shutil.copytree(RECORDED / "sparsify" / name, root / name)
    (root / "README.md").write_text("about")
    (root / "optimizer_0.pt").write_text("huge")

    def listed(repository, *, revision=None):
        if repository != "someone/saes":
            raise RepositoryNotFoundError("404: no such repository", response=_Response())
        return [path.relative_to(root).as_posix() for path in sorted(root.rglob("*")) if path.is_file()]

    def downloaded(repository, *, revision=None, allow_patterns=None, local_files_only=False):
        if local_files_only:
            if not cache.is_dir():
                raise LocalEntryNotFoundError("not in the cache")
            return str(cache)
        calls.append((repository, revision, allow_patterns))
        for file in listed(repository):
            if allow_patterns is None or any(fnmatch.fnmatch(file, pattern) for pattern in allow_patterns):
                (cache / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(root / file, cache / file)
        return str(cache)

    monkeypatch.setattr(hub, "hub_reachable", lambda: True)
    monkeypatch.setattr(hub, "list_repo_files", listed)
    monkeypatch.setattr(hub, "snapshot_download", downloaded)
    monkeypatch.chdir(tmp_path)
    return root, cache, calls


class _Response:
    headers: dict[str, str] = {}  # noqa: RUF012
    request = None
    status_code = 404


def test_only_the_folder_named_is_downloaded(repository):
    _, cache, calls = repository
    sae = load_sae("someone/saes/layers.3.mlp")
    assert sae.config.site == "mlp_3"
    assert calls == [("someone/saes", None, ["layers.3.mlp", "layers.3.mlp/*"])]
    assert sorted(path.name for path in cache.iterdir()) == ["layers.3.mlp"]


def test_a_site_picks_the_folder_and_a_revision_is_passed_on(repository):
    _, _, calls = repository
    assert load_sae("hf://someone/saes@v1.0", site="resid_3").config.extra["module"] == "layers.3"
    assert calls == [("someone/saes", "v1.0", ["layers.3", "layers.3/*"])]
    assert list(load_saes("someone/saes", sites=["mlp_3"])) == [Site("mlp", 3)]


def test_a_whole_repository_is_a_set(repository):
    _, _, calls = repository
    assert [str(site) for site in load_saes("someone/saes")] == ["mlp_3", "resid_3"]
    assert calls == [("someone/saes", None, ["layers.3", "layers.3/*", "layers.3.mlp", "layers.3.mlp/*"])]


def test_a_set_may_name_files_of_other_repositories(repository):
    root, _, calls = repository
    for folder in ("layers.3", "layers.3.mlp"):
        shutil.rmtree(root / folder)
    (root / "config.yaml").write_text(
        "model_kind: transcoder_set\nfeature_input_hook: ln2.hook_normalized\ntranscoders:\n"
        "- hf://someone/saes/b/layer_0.safetensors\n- hf://someone/saes/b/layer_1.safetensors?revision=v1\n"
    )
    for folder in ("b", "sets"):
        (root / folder).mkdir()
    (root / "config.yaml").rename(root / "sets" / "config.yaml")
    for layer in range(2):
        state = {"W_enc": torch.ones(4, 3), "W_dec": torch.ones(4, 3), "b_enc": torch.ones(4), "b_dec": torch.ones(3)}
        save_file(state, root / "b" / f"layer_{layer}.safetensors")
    saes = load_saes("someone/saes/sets")
    assert [(str(site), saes.config(site).read) for site in saes] == [("mlp_0", "mlp_norm"), ("mlp_1", "mlp_norm")]
    assert calls[1] == ("someone/saes", None, ["b/layer_0.safetensors", "b/config.yaml", "b/config.json"])
    assert calls[2][1] == "v1"


def test_several_autoencoders_are_listed_not_downloaded(repository):
    _, _, calls = repository
    with pytest.raises(UserError, match=r"'someone/saes' holds 2 autoencoders, name one: layers.3, layers.3.mlp"):
        load_sae("someone/saes")
    with pytest.raises(UserError, match=r"no autoencoder for mlp_9: it has mlp_3, resid_3"):
        load_sae("someone/saes", site="mlp_9")
    with pytest.raises(UserError, match=r"has no 'layers.3.mpl': nearest are layers.3.mlp"):
        load_sae("someone/saes/layers.3.mpl")
    assert calls == []


def test_a_repository_with_one_autoencoder_at_its_root(repository):
    root, _, calls = repository
    shutil.rmtree(root / "layers.3.mlp")
    for file in (root / "layers.3").iterdir():
        shutil.move(file, root / file.name)
    assert load_sae("someone/saes", site="resid_0").config.site == "resid_0"
    assert calls == [("someone/saes", None, None)]


def test_without_the_hub_the_cache_serves_what_was_downloaded(repository, monkeypatch):
    def fail(*args, **options):
        raise OfflineModeIsEnabled("offline")

    load_sae("someone/saes/layers.3.mlp")
    monkeypatch.setattr(hub, "list_repo_files", fail)
    assert load_sae("someone/saes/layers.3.mlp").config.site == "mlp_3"
    assert load_sae("someone/saes", site="mlp_3").config.site == "mlp_3"
    with pytest.raises(UserError, match=r"no autoencoder in .*layers.3'"):
        load_sae("someone/saes/layers.3")


@pytest.mark.parametrize(
    "error",
    [
        HfHubHTTPError("401: gated", response=_Response()),
        LocalEntryNotFoundError("no connection"),
        OSError("no route to host"),
        RuntimeError("an error of the library that makes requests"),
    ],
)
def test_an_unreachable_hub_is_one_sentence(error, monkeypatch):
    def fail(*args, **options):
        raise error

    def not_cached(*args, **options):
        raise LocalEntryNotFoundError("not in the cache")

    monkeypatch.setattr(hub, "hub_reachable", lambda: True)
    monkeypatch.setattr(hub, "list_repo_files", fail)
    monkeypatch.setattr(hub, "snapshot_download", not_cached)
    with pytest.raises(UserError, match=r"'someone/saes' is neither a path on this disk nor a hub repository"):
        load_sae("someone/saes")


@pytest.mark.parametrize("source", ["./saes", "/no/where", "~/nothing", "saes", "a/b/../c@"])
def test_a_path_that_does_not_exist_is_not_looked_up_on_the_hub(source, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)

    def reached(*args, **options):
        raise AssertionError("the hub was asked")

    monkeypatch.setattr(hub, "list_repo_files", reached)
    with pytest.raises(UserError, match=r"there is no such path"):
        local_path(source)


def test_choose():
    assert choose(["a"], source="x") == "a"
    assert choose([], source="x") == "."
    assert choose(["w/average_l0_60", "w/average_l0_139"], source="x") == "w/average_l0_139"
    with pytest.raises(UserError, match=r"holds 12 autoencoders.* \(4 more\)"):
        choose([f"s{i}" for i in range(12)], source="x")


@pytest.mark.parametrize(
    ("name", "site"),
    [
        ("blocks.3.hook_resid_post", "resid_3"),
        ("blocks.3.hook_resid_pre", "resid_2"),
        ("blocks.0.hook_resid_pre", "embed"),
        ("blocks.3.hook_out", "resid_3"),
        ("blocks.3.hook_in", "resid_2"),
        ("blocks.3.mlp.hook_out", "mlp_3"),
        ("blocks.3.attn.hook_out", "attn_3"),
        ("blocks.3.attn.q.hook_out", ""),
        ("embed.hook_out", "embed"),
        ("blocks.11.hook_mlp_out", "mlp_11"),
        ("blocks.11.hook_attn_out", "attn_11"),
        ("blocks.11.attn.hook_z", ""),
        ("blocks.11.mlp.hook_post", ""),
        ("blocks.11.ln2.hook_normalized", ""),
        ("hook_embed", "embed"),
        ("layers.5", "resid_5"),
        ("gpt_neox.layers.5.attention", "attn_5"),
        ("model.layers.5.self_attn", "attn_5"),
        ("h.2.mlp", "mlp_2"),
        ("layers.5.mlp.act", ""),
        ("embed_tokens", "embed"),
        ("resid_post_layer_12", "resid_12"),
        ("attention_out_layer_1", "attn_1"),
        ("mlp_out_layer3", "mlp_3"),
        ("Llama3_1-8B-Base-L7M-8x", "mlp_7"),
        ("L7A", "attn_7"),
        ("runs/demo/saes/attn_0", "attn_0"),
        ("gemma-scope-2b-pt-transcoders/layer_3/width_16k", ""),
        ("my_layer_3_sae", ""),
    ],
)
def test_sites_from_the_names_others_use(name, site):
    assert site_named(name) == site
    assert site_named((Path("/data/run") / name).as_posix()) == site


@pytest.mark.parametrize(
    ("hook", "model", "site"),
    [
        ("hook_embed", "gpt2-small", ""),  # wte alone, without the positions that are part of our embed
        ("hook_embed", "EleutherAI/pythia-70m-deduped", "embed"),
        ("blocks.0.hook_resid_pre", "gpt2", "embed"),
        ("blocks.3.mlp.hook_out", "google/gemma-2-2b", ""),  # before the norm behind the MLP
        ("blocks.3.ln2_post.hook_out", "google/gemma-2-2b", "mlp_3"),
        ("blocks.3.mlp.hook_out", "gpt2", "mlp_3"),
    ],
)
def test_hooks_that_depend_on_the_model(hook, model, site):
    assert hook_site(hook, model) == site


def test_what_a_release_of_saelens_is_called_on_the_hub():
    assert repository_of("gpt2-small-mlp-out-v5-128k") == "jbloom/GPT2-Small-OAI-v5-128k-mlp-out-SAEs"
    assert repository_of("gemma-scope-2b-pt-res-canonical") == "google/gemma-scope-2b-pt-res"
    assert repository_of("llama_scope_lxm_32x") == "fnlp/Llama3_1-8B-Base-LXM-32x"
    assert repository_of("runs") == "" and released("google/gemma-scope-2b-pt-res/layer_12") is None


@pytest.mark.parametrize("site", ["embed", "resid_0", "mlp_11", "attn_3", ""])
def test_names_written_for_others_read_back(site):
    assert site_named(transformer_lens_hook(site)) == site
    assert site_named(dictionary_learning_name(site)) == site
