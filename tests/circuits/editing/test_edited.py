"""Edits that stand: with and without a cache, padded and alone, nested, scheduled, and as files."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from circuits.editing import site_edit, template_means
from circuits.editing.applied import FeatureEdits, edited, with_references
from circuits.editing.declaration import Edit, load_edits, save_edits
from circuits.editing.edit import measure_edit
from circuits.editing.saved_model import save_model
from circuits.editing.site_edit import FeatureReader, make_edits
from circuits.editing.trial import EditOptions
from sae.autoencoder import SAEConfig, SparseAutoencoder
from sae.errors import UserError
from sae.model.load import load_model
from sae.model.sites import Site
from sae.model.tokens import Tokens
from tests.circuits.conftest import MIXED, with_spans
from tests.near import assert_near

SITE = Site("resid", 0)
TEXTS = ["the man near the dogs runs", "she sees the old king"]


@pytest.fixture(scope="module")
def active(tiny_model, tiny_prompts, tiny_saes) -> list[int]:
    """The four features of resid_0 that are most active on the prompts."""
    x = tiny_model.run(tiny_prompts.clean, capture=[SITE]).activations[SITE]
    f = tiny_saes[SITE].encode(x)[tiny_prompts.clean.attention_mask.bool()]
    return f.sum(0).topk(4).indices.tolist()


def edits_of(active: list[int]) -> dict[str, Edit]:
    names = [f"resid_0/{index}" for index in active]
    return {
        "zero": Edit(names),
        "mean": Edit(names, "mean"),
        "mean by template": Edit(names, "mean", by_template=True),
        "resample": Edit(names, "resample"),
        "clamp": Edit(names, "clamp", 0.25, relative=True),
        "active": Edit(names, "steer", 3.0, where="active"),
        "frozen": Edit(names, "steer", 8.0, freeze="attention"),
        "prompt": Edit(names, "steer", 8.0, where="prompt"),
        "generated": Edit(names, "scale", 4.0, where="generated"),
        "schedule": Edit(names[:1], "steer", 9.0, schedule=(0.0, 1.0, 2.0, 0.0)),
        "span": Edit([f"{names[0]}@b", names[1]], "steer", 5.0),
        "position": Edit([f"{names[0]}@1"], "set", 5.0),
    }


@pytest.mark.parametrize("name", list(edits_of([0, 1, 2, 3])))
def test_the_same_tokens_with_and_without_a_cache_and_in_any_batch(tiny_model, tiny_prompts, tiny_saes, active, name):
    """Prompts of 5 and 7 tokens, padded; every row alone; without a cache, where each pass sees the whole text."""
    prompts = with_spans(tiny_prompts, MIXED)
    prompts = prompts[:4]  # of both lengths
    plain = tiny_model.generate(prompts.clean, max_new_tokens=3)
    edit = with_references(tiny_model, tiny_saes, edits_of(active)[name], prompts=prompts)
    with edited(tiny_model, tiny_saes, edit, prompts=prompts):
        cached = tiny_model.generate(prompts.clean, max_new_tokens=3)
        whole = tiny_model.generate(prompts.clean, max_new_tokens=3, use_cache=False)
        alone = [tiny_model.generate(prompts[row].clean, max_new_tokens=3)[0, -3:] for row in range(2)]
        sampled = [
            torch.manual_seed(0)
            and tiny_model.generate(prompts.clean, max_new_tokens=2, do_sample=True, use_cache=cache)
            for cache in ((True, False) if name in ("active", "generated") else ())
        ]
    assert torch.equal(cached, whole) and (not sampled or torch.equal(*sampled))
    assert torch.equal(cached[:2, -3:], torch.stack(alone))
    assert name in ("prompt", "span", "position", "clamp") or not torch.equal(cached, plain)
    assert torch.equal(tiny_model.generate(prompts.clean, max_new_tokens=3), plain)  # the block has ended


def test_a_run_is_edited_as_by_hand(tiny_model, tiny_prompts, tiny_saes, active):
    """Places, strengths and references, each against decoding the changed features."""
    prompts, sae = tiny_prompts, tiny_saes[SITE]
    x = tiny_model.run(prompts.clean, capture=[SITE]).activations[SITE]
    f = sae.encode(x)[..., active]  # [B, S, 4]
    real = prompts.clean.attention_mask.bool()
    largest = f[real].amax(0)
    by_place = torch.zeros_like(f)
    both = [f, sae.encode(tiny_model.run(prompts.patch, capture=[SITE]).activations[SITE])[..., active]]
    for length in (5, 7):
        rows = prompts.clean.lengths == length
        by_place[rows, -length:] = torch.cat([of_side[rows, -length:] for of_side in both]).mean(0)
    expected = {
        "mean": f[real].mean(0),
        "mean by template": by_place,
        "clamp": torch.minimum(f, 0.25 * largest),
        "active": torch.where(f != 0, f + 3, f),
        "generated": f,
    }
    for name, wanted in expected.items():
        with edited(tiny_model, tiny_saes, edits_of(active)[name], prompts=prompts):
            run = tiny_model.run(prompts.clean, capture=[SITE])
        by_hand = x + (wanted - f) @ sae.W_dec[active]
        assert_near(run.activations[SITE][real], by_hand[real])


def test_prompts_of_the_same_tokens_keep_their_own_templates(tiny_model, tiny_prompts, tiny_saes, active):
    twice = replace(tiny_prompts[[0, 0, 2, 4]], templates=["a", "b", "a", "b"], template_rule="field")
    edit = edits_of(active)["mean by template"]
    with edited(tiny_model, tiny_saes, edit, prompts=twice):
        both = tiny_model.run(twice.clean, capture=[SITE]).activations[SITE]
    edits = FeatureEdits(tiny_model, tiny_saes, [with_references(tiny_model, tiny_saes, edit, prompts=twice)],
                         prompts=twice)  # fmt: skip
    for row in (0, 1):
        alone = tiny_model.run(twice[row].clean, capture=[SITE], edits=edits(twice[row])).activations[SITE]
        assert_near(both[row : row + 1, -alone.shape[1] :], alone)
    assert (both[0] - both[1]).abs().max() > 1e-3


def test_edits_of_one_block_add_up_and_blocks_nest(tiny_model, tiny_prompts, tiny_saes, active):
    names = [f"resid_0/{index}" for index in active]
    zero, steer = Edit(names[:2]), Edit(names[2], "steer", 2.0)
    by_hand = make_edits(tiny_saes, {SITE: torch.tensor(active[:2])})[SITE]
    x = tiny_model.run(tiny_prompts.clean, capture=[SITE]).activations[SITE]
    add = 2.0 * tiny_saes[SITE].W_dec[active[2]]
    with edited(tiny_model, tiny_saes, [steer, zero]):
        assert_near(tiny_model.run(tiny_prompts.clean, capture=[SITE]).activations[SITE], by_hand(x) + add)
    with edited(tiny_model, tiny_saes, steer), edited(tiny_model, tiny_saes, zero):
        assert_near(tiny_model.run(tiny_prompts.clean, capture=[SITE]).activations[SITE], by_hand(x + add))
        also = tiny_model.run(tiny_prompts.clean, capture=[SITE], edits={SITE: lambda x: 2 * x}).activations[SITE]
        assert_near(also, 2 * by_hand(x + add))


@pytest.mark.parametrize("architecture", ["topk", "relu", "jumprelu"])
def test_only_edited_features_are_read_and_rightly(tiny_model, tiny_prompts, make_saes, architecture):
    sae = make_saes(tiny_model, architecture=architecture)[SITE]
    x = tiny_model.run(tiny_prompts.clean, capture=[SITE]).activations[SITE]
    index = torch.tensor([1, 7, 20, 33])
    assert_near(FeatureReader(sae, index)(x), sae.encode(x)[..., index])


@pytest.mark.parametrize("rank_scale", [False, True])
def test_what_is_read_in_blocks_is_what_the_whole_encoder_says(monkeypatch, rank_scale):
    """Features that win, that lose in an early block, and that lose in a late one, as brute force says."""
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(256, 16, generator=generator) for name in ("W_enc", "W_dec")}
    tensors |= {"b_enc": torch.randn(256, generator=generator), "b_dec": torch.randn(16, generator=generator)}
    if rank_scale:
        tensors["rank_scale"] = torch.rand(256, generator=generator) + 0.5
    sae = SparseAutoencoder(SAEConfig("topk", d_model=16, n_features=256, k=9), tensors)
    x, index = torch.randn(3, 70, 16, generator=generator), torch.tensor([250, 3, 77])
    monkeypatch.setattr(site_edit, "BLOCK_BYTES", 4 * 16 * 20)
    reader, right = FeatureReader(sae, index), sae.encode(x)[..., index]
    sizes: list[int] = []
    whole = reader._among_all
    monkeypatch.setattr(reader, "_among_all", lambda z: (sizes.append(len(z)), whole(z))[1])
    assert_near(reader(x), right)
    assert 0 < int((right != 0).any(-1).sum()) <= sum(sizes) < 100  # the whole encoder at a few of 210 tokens alone


def test_edits_go_to_files_and_back(tmp_path, active):
    edits = [Edit(edit.names, edit.operation, edit.value, where=edit.where, schedule=list(edit.schedule),
                  freeze=edit.freeze)
             for edit in edits_of(active).values()]  # fmt: skip
    edits.append(Edit(["mlp_0/1"], "resample", reference={"mlp_0/1": [0.5, 0.0]}))
    path = save_edits(edits, tmp_path / "edits.json")
    assert load_edits(path) == edits
    data = json.loads(path.read_text())
    data["groups"] = [{"name": "mine", "nodes": ["mlp_0/3@b", "resid_0/error", "mlp_0/4"], "collapsed": True}]
    data["edits"] = [{"features": ["mine", "mlp_0/3@b"], "operation": "zero"}]
    path.write_text(json.dumps(data))
    assert load_edits(path) == [Edit(["mlp_0/3@b", "mlp_0/4"])]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"operatoin": "zero"}, r"edits\[0\]: unknown key 'operatoin'.*did you mean 'operation'"),
        ({"value": "much"}, r"key 'edits\[0\]\.value' is \"much\": expected a valid number"),
        ({"freeze": "norms"}, r"key 'edits\[0\]\.freeze' is \"norms\""),
        ({"where": "somewhere"}, r"key 'edits\[0\]\.where' is \"somewhere\""),
        ({"value": 2.0}, "'zero' takes no value"),
        ({"features": ["theirs"], "groups": 1}, "unknown key 'groups'"),
        (
            {"features": ["a/1", "a/2@b"], "where": "generated"},
            "where is 'generated', and a/2@b is of tokens of prompts",
        ),
        ({"features": ["a/2@5"], "where": "generated"}, "leave one of them out"),
        ({"features": ["a/1@generated"], "where": "prompt"}, "a/1@generated is of generated tokens alone"),
        ({"where": "prompt", "schedule": [1, 0]}, "a schedule is of generated tokens"),
    ],
)
def test_a_wrong_edit_is_told_in_one_sentence(tmp_path, change, message):
    path = tmp_path / "edits.json"
    edit = {"features": ["mlp_0/3"], "operation": "zero", **change}
    path.write_text(json.dumps({"schema_version": 1, "kind": "edits", "edits": [edit]}))
    with pytest.raises(UserError, match=message):
        load_edits(path)


def test_what_an_edit_needs_is_asked_for(tiny_model, tiny_saes, tiny_prompts):
    for edit, message in (
        (Edit("resid_0/1", "mean"), "the mean of resid_0/1 is not known"),
        (Edit("resid_0/1@b"), "the span 'b' is one of prompts"),
        (Edit("resid_0/1", "resample", reference={"resid_0/1": 2.0}), "expected a list of its values"),
    ):
        with pytest.raises(UserError, match=message), edited(tiny_model, tiny_saes, edit):
            pass
    with edited(tiny_model, tiny_saes, Edit("resid_0/1", "mean", reference={"resid_0/1": 2.0})):
        assert (
            tiny_model.run(Tokens(torch.tensor([[3, 4]]), torch.ones(1, 2, dtype=torch.int64))).logits.isfinite().all()
        )


@pytest.mark.slow
def test_steering_is_saved_as_another_bias(tiny_model, tiny_saes, tiny_prompts, tmp_path):
    """The saved model gives the logits of the edited one; what is no change of a bias is refused with the reason."""
    edits = [Edit(["mlp_0/3", "mlp_0/7"], "steer", 2.0), Edit("attn_1/5", "steer", -3.0)]
    folder = save_model(tiny_model, tiny_saes, edits, tmp_path / "saved")
    saved = load_model(folder, device="cpu")
    with edited(tiny_model, tiny_saes, load_edits(folder / "edits.json")):
        wanted = tiny_model.run(tiny_prompts.clean).logits
    assert_near(saved.run(tiny_prompts.clean).logits, wanted)
    assert not torch.allclose(wanted, tiny_model.run(tiny_prompts.clean).logits, atol=1e-3)
    for edit, message in (
        (Edit("mlp_0/3"), "depends on how active"),
        (Edit("mlp_0/3@generated", "steer", 2.0), "some tokens alone"),
        (Edit("resid_0/3", "steer", 2.0), "sum of several sublayers"),
    ):
        with pytest.raises(UserError, match=message):
            save_model(tiny_model, tiny_saes, edit, tmp_path / "other")
    with pytest.raises(UserError, match="not empty"):
        save_model(tiny_model, tiny_saes, edits, folder)


@pytest.mark.slow
@pytest.mark.parametrize("names", [("resid_0/3", "mlp_1/7"), ("resid_0/3@b", "mlp_1/7")])
def test_what_draws_refer_to_is_measured_once_and_is_that_of_each_alone(
    tiny_model, tiny_saes, tiny_prompts, monkeypatch, names
):
    """Passes that read features are as many for five draws as for two; each draw is what it is without the others."""
    prompts = with_spans(tiny_prompts, MIXED) if "@" in names[0] else tiny_prompts
    edit = Edit(names, "mean", by_template="@" not in names[0])
    passes, read = [], []
    reader = template_means.FeatureReader

    def count(*arguments):
        passes.append(arguments)
        return reader(*arguments)

    monkeypatch.setattr(template_means, "FeatureReader", count)
    monkeypatch.setattr("circuits.editing.applied.FeatureReader", count)
    for n in (2, 5):
        passes.clear()
        options = EditOptions(n_random=n, texts=TEXTS, resamples=0, scales=[0.5])
        report = measure_edit(tiny_model, tiny_saes, edit, prompts, options)
        read.append(len(passes))
        assert len(report.random) == len(report.random_equal_norm) == n
    assert read[0] == read[1] > 0
    for features, control in zip(report.random_features, report.random, strict=True):
        alone = EditOptions(n_random=0, texts=TEXTS, resamples=0)
        after = measure_edit(tiny_model, tiny_saes, replace(edit, features=features), prompts, alone).after
        assert_near(torch.tensor(control.overall.metric), torch.tensor(after.overall.metric))
        assert_near(torch.tensor(control.ce), torch.tensor(after.ce))
