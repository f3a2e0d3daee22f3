"""Site names, their order, the table of module paths and what a user may ask for."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sae.errors import UserError
from sae.model.sites import Site, SitePath, select_sites, site_table
from tests.conftest import MODEL_FAMILIES, tiny_hf

NAMES = ["embed", "attn_0", "mlp_0", "resid_0", "attn_1", "mlp_1", "resid_1"]
SITES = [Site.parse(name) for name in NAMES]


@given(st.sampled_from(["attn", "mlp", "resid"]), st.integers(0, 200))
def test_names_round_trip(kind: str, layer: int) -> None:
    site = Site(kind, layer)
    assert Site.parse(site.name) == Site.parse(f"{kind}.{layer}") == site == Site.parse(site)
    assert str(site) == site.name == f"{kind}_{layer}"


@pytest.mark.parametrize(
    "text", ["resid", "resid_", "resid_x", "resid_-1", "embed_0", "head_1", "", "resid_1_2", "resid_²"]
)
def test_names_that_are_no_sites(text: str) -> None:
    with pytest.raises(UserError, match="unknown site"):
        Site.parse(text)


def test_a_mistyped_name_gets_the_nearest() -> None:
    with pytest.raises(UserError, match="did you mean 'resid_3'"):
        Site.parse("resd_3")
    with pytest.raises(UserError, match=r"unknown kind of site 'att'.*did you mean 'attn'"):
        Site("att", 1)
    with pytest.raises(UserError, match="embed has no layer"):
        Site("embed", 1)


def test_sites_sort_in_forward_order() -> None:
    sites = [Site("embed")] + [Site(kind, layer) for layer in range(12) for kind in ("attn", "mlp", "resid")]
    shuffled = random.Random(0).sample(sites, len(sites))
    assert sorted(shuffled) == sites
    assert Site("resid", 2) < Site("attn", 10) and Site("mlp", 3) >= Site("attn", 3)


@pytest.mark.parametrize("architecture", MODEL_FAMILIES)
def test_table_lists_every_site_in_the_order_of_the_forward_pass(architecture: str) -> None:
    hf = tiny_hf(architecture)
    table = site_table(hf)
    assert [site.name for site in table] == NAMES
    reached: list[str] = []
    for path in table.values():
        hf.get_submodule(path.module).register_forward_hook(
            lambda module, inputs, output, name=path.module: reached.append(name)
        )
    hf(hf.dummy_inputs["input_ids"])
    assert reached == [path.module for path in table.values()]


def test_overrides_replace_kinds_and_single_sites() -> None:
    hf = tiny_hf("llama")
    table = site_table(
        hf, {"attn": "model.layers.{layer}.self_attn.o_proj:input", "mlp_1": SitePath("model.layers.1.mlp.down_proj")}
    )
    assert table[Site("attn", 1)] == SitePath("model.layers.1.self_attn.o_proj", "input")
    assert table[Site("mlp", 0)] == SitePath("model.layers.0.mlp", "output")
    assert table[Site("mlp", 1)] == SitePath("model.layers.1.mlp.down_proj", "output")
    assert [site.name for site in table] == NAMES


def test_unknown_architecture_has_the_sites_it_is_given() -> None:
    hf = tiny_hf("llama")
    hf.config.model_type = "newest"
    with pytest.raises(UserError, match=r"unknown architecture 'newest': known are gpt2.*site_paths"):
        site_table(hf)
    assert [site.name for site in site_table(hf, {"resid": "model.layers.{layer}"})] == ["resid_0", "resid_1"]


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        (
            {"attn": "model.layers.{layer}.self_atn"},
            r"site 'attn_0'.*no module.*did you mean 'model.layers.0.self_attn'",
        ),
        ({"resid_1": "model.layers.7"}, "site 'resid_1'.*no module 'model.layers.7'"),
        ({"attn": "model.layers.0.self_attn"}, r"needs \{layer\}"),
        ({"attn": "model.layers.{layer}.self_attn:inside"}, "side 'inside'.*output and input"),
        ({"head": "lm_head"}, "unknown site 'head'"),
    ],
)
def test_wrong_overrides(paths: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        site_table(tiny_hf("llama"), paths)


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("all", NAMES),
        ("resid", ["resid_0", "resid_1"]),
        ("resid, mlp", ["mlp_0", "resid_0", "mlp_1", "resid_1"]),
        ("resid_1,attn.0", ["attn_0", "resid_1"]),
        (["resid_1", Site("embed"), "resid_1"], ["embed", "resid_1"]),
        (Site("mlp", 1), ["mlp_1"]),
    ],
)
def test_selection(spec: str, expected: list[str]) -> None:
    assert [site.name for site in select_sites(spec, SITES)] == expected


def test_selection_of_what_is_not_there() -> None:
    with pytest.raises(UserError, match=r"unknown site 'resd_1'.*did you mean 'resid_1'"):
        select_sites("mlp_0,resd_1", SITES)
    with pytest.raises(UserError, match="unknown site 'resid_2'"):
        select_sites("resid_2", SITES)
    with pytest.raises(UserError, match="no site selected"):
        select_sites(" , ", SITES)
