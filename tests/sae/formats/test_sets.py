"""Whole sets of dictionaries, one for each site, chosen by what their paths say; and the table of releases."""

import pytest
from safetensors.torch import save_file

from sae.errors import UserError
from sae.formats import FORMATS
from sae.formats.locate import check_source
from sae.formats.releases import full_name, releases
from sae.formats.sets import Choice, choose_set, split_source, with_choice
from sae.saes import load_saes
from tests.sae.formats.test_published import D, F, gemma_scope

GS2 = "google/gemma-scope-2-1b-pt"
KINDS = {"resid_post": "resid", "attn_out": "attn", "mlp_out": "mlp", "transcoder": "mlp"}
PATHS = [
    f"{kind}_all/layer_{layer}_width_{width}_l0_{l0}"
    for kind in KINDS
    for layer in range(3)
    for width in ("16k", "262k")
    for l0 in ("small", "big")
] + [
    "transcoder_all/layer_1_width_16k_l0_small_affine", "resid_post/layer_1_width_16k_l0_small",
    "resid_post/layer_1_width_65k_l0_medium", "resid_post/layer_1_width_16k_l0_small_seed_1",
]  # fmt: skip


def test_one_dictionary_a_site_is_chosen():
    chosen = choose_set(PATHS, GS2, Choice(width="16k", l0="small"))
    assert chosen == [
        f"{kind}_all/layer_{n}_width_16k_l0_small" for kind in ("resid_post", "attn_out", "mlp_out") for n in range(3)
    ]
    assert choose_set(PATHS, GS2, Choice("16384", "big"), ["mlp_2"]) == ["mlp_out_all/layer_2_width_16k_l0_big"]
    for width in ("65k", "65536"):
        assert choose_set(PATHS, GS2, Choice(width, "medium")) == ["resid_post/layer_1_width_65k_l0_medium"]
    of_other_seeds = [path for path in reversed(PATHS) if path.startswith("resid_post/")]
    assert choose_set(of_other_seeds, GS2, Choice("16k", "small")) == ["resid_post/layer_1_width_16k_l0_small"]
    transcoders = [path for path in PATHS if path.startswith("transcoder")]
    assert choose_set(transcoders, GS2, Choice("16k", "small"))[1] == "transcoder_all/layer_1_width_16k_l0_small"
    affine = choose_set(transcoders, GS2, Choice("16k", "small", affine="1"))
    assert affine == ["transcoder_all/layer_1_width_16k_l0_small_affine"]


def test_what_can_be_chosen_is_told():
    with pytest.raises(
        UserError, match=r"4 dictionaries for resid_0, choose one: --width 16k, 262k and --l0 big, small"
    ):
        choose_set(PATHS, GS2, Choice(), ["resid_0"])
    with pytest.raises(UserError, match=r"no dictionary of width 1m: --width 16k, 65k, 262k"):
        choose_set(PATHS, GS2, Choice(width="1m"))
    with pytest.raises(UserError, match=r"did you mean 'width'"):
        split_source("a/b?widht=3")
    with pytest.raises(UserError, match=r"nothing to choose by"):
        split_source("a/b?")


def test_the_nearest_l0_is_taken():
    paths = [
        f"layer_{n}/width_{width}/average_l0_{l0}" for n in range(2) for width in ("16k", "65k") for l0 in (12, 82, 309)
    ]
    source = "google/gemma-scope-2b-pt-res"
    assert choose_set(paths, source, Choice("16k")) == [f"layer_{n}/width_16k/average_l0_82" for n in range(2)]
    assert choose_set(paths, source, Choice("65k", "20")) == [f"layer_{n}/width_65k/average_l0_12" for n in range(2)]
    with pytest.raises(UserError, match=r"--width 16k, 65k"):
        choose_set(paths, source, Choice())
    paper = ["embed/10_32768", "embed/0_8192", "resid_out_layer0/10_32768", "resid_out_layer0/0_8192"]
    assert choose_set(paper, "dictionaries/pythia-70m-deduped", Choice("32768")) == [paper[0], paper[2]]


def test_a_whole_set_loads_and_several_make_one(random, tmp_path):
    root = tmp_path / "gemma-scope-2-1b-pt"
    for kind in KINDS:
        for width in ("16k", "262k"):
            gemma_scope(root / f"{kind}_all" / f"layer_0_width_{width}_l0_small", random, prefix="w_", safetensors=True)
    saes = load_saes(f"{root}?width=16k&l0=small")
    assert [str(site) for site in saes] == ["attn_0", "mlp_0", "resid_0"]
    assert not saes.config(list(saes)[1]).read
    source = with_choice(f"{root}/resid_post_all,{root}/transcoder_all?width=262k", width="16k", l0="small")
    mixed = load_saes(source)
    assert [str(site) for site in mixed] == ["mlp_0", "resid_0"]
    assert [mixed.config(site).read for site in mixed] == ["mlp_in", ""]
    assert "width_262k" in mixed.config(next(iter(mixed))).extra["source"]
    with pytest.raises(UserError, match=r"has no autoencoder for resid_5"):
        load_saes(f"{root}?width=16k", sites=["resid_5"])
    with pytest.raises(UserError, match=r"several autoencoders for site resid_0"):
        load_saes(f"{root}/resid_post_all?width=16k,{root}/resid_post_all?width=262k")


def test_a_set_of_files_is_whole(random, tmp_path):
    for layer in (0, 1, 3):
        state = {"W_enc": random(F, D), "W_dec": random(F, D), "b_enc": random(F), "b_dec": random(D)}
        save_file(state, tmp_path / f"layer_{layer}.safetensors")
    with pytest.raises(UserError, match=r"has layer_3.safetensors and no layer_2.safetensors"):
        load_saes(tmp_path)
    assert [str(site) for site in load_saes(tmp_path, sites=["mlp_3", "mlp_0"])] == ["mlp_0", "mlp_3"]
    assert [str(site) for site in load_saes(tmp_path / "layer_1.safetensors")] == ["mlp_1"]
    here = tmp_path / "set"
    here.mkdir()
    names = "\n".join(f"- ../layer_{layer}.safetensors" for layer in (0, 1))
    (here / "config.yaml").write_text(f"feature_input_hook: hook_resid_mid\ntranscoders:\n{names}\n")
    saes = load_saes(here)
    assert [(str(site), saes.config(site).read) for site in saes] == [("mlp_0", "mlp_resid"), ("mlp_1", "mlp_resid")]
    (here / "config.yaml").write_text("transcoders:\n- ../layer_1.safetensors\n")
    with pytest.raises(UserError, match=r"belongs to site mlp_1, not to mlp_0"):
        load_saes(here)


def test_the_table_of_releases():
    table = releases()
    assert {release.reader for release in table.values()} <= {form.name for form in FORMATS}
    for name, release in table.items():
        assert full_name(name) == release.source and "/" not in name and release.model.count("/") == 1
        assert all(len(part.split("/")) in (2, 3) for part in release.source.split(","))
        check_source(name)
    assert full_name("pythia-70m-deduped-sfc").count("ctigges/") == 3
    assert full_name("gemma-scope-2-1b-pt?width=16k,runs/x") == f"{GS2}?width=16k,runs/x"
    with pytest.raises(UserError, match=r"did you mean 'gemma-scope-2-1b-pt'"):
        check_source("gemma-scope-2-1b-tp")
