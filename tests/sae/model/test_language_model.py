"""Model access against plain torch: the same tensors, gradients and tokens, on every architecture."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from nnsight import TransformersModel
from torch import Tensor

from sae.errors import UserError
from sae.model.language_model import LanguageModel, Tokens
from sae.model.sites import Site
from tests.conftest import MODEL_FAMILIES, tiny_hf, word_tokenizer
from tests.near import assert_near

TEXTS = ["the man near the old dogs runs", "she sees", "they", "a boy who likes cats sings ."]  # lengths 7, 2, 1, 7
EMBED, ATTN_0, MLP_0, RESID_0 = Site("embed"), Site("attn", 0), Site("mlp", 0), Site("resid", 0)
MODELS: dict[str, LanguageModel] = {}


@pytest.fixture(params=("gpt2", "gpt_neox", "llama", "gemma2"))  # transposed weights, one sum for both sublayers, norms
def model(request: pytest.FixtureRequest, make_tiny_model: Callable[..., LanguageModel]) -> LanguageModel:
    """A model of each architecture in turn, built once."""
    if request.param not in MODELS:
        MODELS[request.param] = make_tiny_model(request.param)
    return MODELS[request.param]


def first(value: Any) -> Tensor:
    return value[0] if isinstance(value, tuple) else value


def replaced(value: Any, x: Tensor) -> Any:
    return (x, *value[1:]) if isinstance(value, tuple) else x


@contextmanager
def torch_hooks(hf: Any, edits: dict[str, Callable[[Tensor], Tensor]]) -> Iterator[None]:
    """Module path -> x -> new x, on the bare Hugging Face model."""
    handles = [
        hf.get_submodule(path).register_forward_hook(lambda _m, _i, out, edit=edit: replaced(out, edit(first(out))))
        for path, edit in edits.items()
    ]
    yield
    for handle in handles:
        handle.remove()


def odd_edit(x: Tensor) -> Tensor:
    return x + 0.5 * x.flip(-1)


# ---- one forward pass


@pytest.mark.parametrize("architecture", MODEL_FAMILIES)
def test_activations_and_logits_equal_those_of_torch_hooks(
    architecture: str, make_tiny_model: Callable[..., LanguageModel]
) -> None:
    model, bare = make_tiny_model(architecture), tiny_hf(architecture)
    tokens = model.tokenize(TEXTS)
    seen: dict[str, Tensor] = {}

    def keep(path: str) -> Callable[[Tensor], Tensor]:
        return lambda x: seen.setdefault(path, x)

    with torch.no_grad(), torch_hooks(bare, {path.module: keep(path.module) for path in model.site_paths.values()}):
        positions = (tokens.attention_mask.cumsum(-1) - 1).clamp(min=0)
        logits = bare(tokens.input_ids, attention_mask=tokens.attention_mask, position_ids=positions).logits
    run = model.run(tokens, capture=model.sites)
    assert list(run.activations) == list(model.sites)
    for site, x in run.activations.items():
        assert torch.equal(x, seen[model.site_paths[site].module]), site
        assert x.shape == (4, 7, model.widths[site])
    assert torch.equal(run.logits, logits)


def test_attention_and_mlp_add_up_to_the_block(model: LanguageModel) -> None:
    run = model.run(model.tokenize(TEXTS), capture=model.sites).activations
    stream = run[EMBED]
    for layer in range(model.n_layers):
        stream = stream + run[Site("attn", layer)] + run[Site("mlp", layer)]
        assert_near(stream, run[Site("resid", layer)], msg=layer)


def test_edits_equal_those_of_torch_hooks(model: LanguageModel) -> None:
    """With two rows, the size at which a tuple lost on writing goes unnoticed; with four see generation."""
    bare = tiny_hf(model.hf.config.model_type)
    tokens = model.tokenize(TEXTS[:2])
    for site in model.sites:
        run = model.run(tokens, edits={site: odd_edit}, capture=[site])
        with torch.no_grad(), torch_hooks(bare, {model.site_paths[site].module: odd_edit}):
            expected = bare(
                tokens.input_ids, attention_mask=tokens.attention_mask, position_ids=tokens.position_ids
            ).logits
        assert torch.equal(run.logits, expected), site
        assert torch.equal(run.activations[site], odd_edit(model.run(tokens, capture=[site]).activations[site]))
        assert not torch.allclose(run.logits, model.run(tokens).logits, atol=1e-3), site


def test_padded_batch_gives_the_numbers_of_single_prompts(model: LanguageModel) -> None:
    batch = model.run(model.tokenize(TEXTS), capture=model.sites, last_only=True)
    for row, text in enumerate(TEXTS):
        single = model.run(model.tokenize([text]), capture=model.sites, last_only=True)
        assert_near(batch.logits[row], single.logits[0])
        for site, x in single.activations.items():
            assert_near(batch.activations[site][row, -x.shape[1] :], x[0])


def test_last_only_unembeds_one_position(model: LanguageModel) -> None:
    tokens = model.tokenize(TEXTS)
    shapes: list[torch.Size] = []
    handle = model.hf.lm_head if hasattr(model.hf, "lm_head") else model.hf.embed_out
    hook = handle.register_forward_hook(lambda _m, _i, out: shapes.append(out.shape))
    last = model.run(tokens, last_only=True).logits
    nothing = model.run(tokens, capture=[RESID_0], need_logits=False)
    hook.remove()
    assert shapes == [(4, 1, model.vocab_size)]  # and the head does not run where no logits are needed
    assert_near(last, model.run(tokens).logits[:, -1:])
    assert nothing.logits.numel() == 0
    assert torch.equal(nothing.activations[RESID_0], model.run(tokens, capture=[RESID_0]).activations[RESID_0])


def test_blocks_behind_the_last_site_do_not_run_without_logits(model: LanguageModel) -> None:
    tokens = model.tokenize(TEXTS)
    full = model.run(tokens, capture=model.sites)
    ran: list[int] = []
    handles = [
        next(module.mlp.children()).register_forward_hook(lambda _m, _i, _o, layer=layer: ran.append(layer))
        for layer in range(model.n_layers)
        for module in [model.hf.get_submodule(model.site_paths[Site("resid", layer)].module)]
    ]
    for site, layers in ((EMBED, []), (ATTN_0, [0]), (RESID_0, [0]), (Site("mlp", 1), [0, 1])):
        ran.clear()
        run = model.run(tokens, capture=[site], need_logits=False)
        assert torch.equal(run.activations[site], full.activations[site])
        assert ran == layers, site
    for handle in handles:
        handle.remove()


# ---- skipping


def test_resumed_runs_equal_the_full_run(model: LanguageModel) -> None:
    tokens = model.tokenize(TEXTS)
    full = model.run(tokens, capture=model.sites)
    for site in model.sites:
        skip = model.resume_from(site, full.activations)
        later = [other for other in model.sites if other >= site]
        resumed = model.run(tokens.repeat(3), skip=skip, capture=later)
        assert_near(resumed.logits, full.logits.repeat(3, 1, 1), msg=site)
        for other in later:
            expected = full.activations[other].repeat(3, 1, 1)
            assert_near(resumed.activations[other], expected, msg=(site, other))


def test_skipped_modules_do_not_run(model: LanguageModel) -> None:
    tokens = model.tokenize(TEXTS)
    full = model.run(tokens, capture=model.sites)
    block = model.hf.get_submodule(model.site_paths[Site("resid", 1)].module)
    ran: set[str] = set()
    handles = [
        module.register_forward_hook(lambda _m, _i, _o, name=name: ran.add(name.split(".")[0]))
        for name, module in block.named_modules()
        if name.startswith(("attn.", "attention.", "self_attn.", "mlp."))
    ]
    model.run(tokens)
    assert len(ran) == 2
    ran.clear()
    model.run(tokens, skip={Site("attn", 1): full.activations[Site("attn", 1)]})
    assert ran == {"mlp"}
    ran.clear()
    model.run(tokens, skip=model.resume_from(Site("resid", 1), full.activations))
    model.run(tokens, skip={Site("resid", 1): full.activations[Site("resid", 1)]})
    for handle in handles:
        handle.remove()
    assert not ran


def test_gradients_reach_the_skip_tensor_of_repeated_rows(model: LanguageModel) -> None:
    """Row r of copy c starts at its own tensor, and its gradient is that of a run of its own."""
    tokens = model.tokenize(TEXTS)
    full = model.run(tokens, capture=model.sites)
    for site in model.sites:
        skip = model.resume_from(site, full.activations)
        x = torch.cat([scale * full.activations[site] for scale in (1.0, 0.5)]).requires_grad_(True)
        run = model.run(tokens.repeat(2), skip={**skip, site: x}, grad=True, last_only=True)
        (gradient,) = torch.autograd.grad(run.logits.square().sum(), x)
        for copy, scale in enumerate((1.0, 0.5)):
            leaf = (scale * full.activations[site]).requires_grad_(True)
            plain = model.run(tokens, edits={site: lambda _, leaf=leaf: leaf}, grad=True)
            (expected,) = torch.autograd.grad(plain.logits[:, -1].square().sum(), leaf)
            rows = slice(copy * 4, copy * 4 + 4)
            assert_near(run.logits[rows], plain.logits[:, -1:])
            assert_near(gradient[rows], expected, 3e-4)
            assert torch.isfinite(gradient).all() and gradient.abs().max() > 0


def test_the_last_mlp_runs_where_its_output_is_read(model: LanguageModel) -> None:
    """At the last position alone if only the logits there are asked for, else at all of them."""
    tokens, last = model.tokenize(TEXTS), Site("mlp", model.n_layers - 1)
    module = model.hf.get_submodule(model.site_paths[Site("resid", last.layer)].module).mlp
    widths: list[int] = []
    first = next(child for child in module.modules() if child.__class__.__name__ in ("Linear", "Conv1D"))
    handle = first.register_forward_hook(lambda _m, inputs, _o: widths.append(inputs[0].shape[1]))
    full = model.run(tokens).logits[:, -1:]
    assert_near(model.run(tokens, last_only=True).logits, full)
    for site in (last, Site("resid", last.layer)):
        assert_near(model.run(tokens, last_only=True, capture=[site]).logits, full)
    doubled = {Site("attn", last.layer): lambda x: 2 * x}
    edited = [model.run(tokens, last_only=only, edits=doubled).logits[:, -1:] for only in (True, False)]
    handle.remove()
    assert torch.allclose(*edited, atol=1e-5) and not torch.allclose(edited[0], full, atol=1e-3)
    n_positions = tokens.n_positions
    assert widths == [n_positions, 1, n_positions, n_positions, 1, n_positions]


def test_resume_with_gaps_in_the_cache(tiny_model: LanguageModel) -> None:
    tokens = tiny_model.tokenize(TEXTS)
    full = tiny_model.run(tokens, capture=tiny_model.sites)
    for kept in ([], [EMBED], [MLP_0, Site("attn", 1)], [RESID_0]):
        cache = {site: full.activations[site] for site in kept}
        skip = tiny_model.resume_from(Site("resid", 1), cache)
        assert set(skip) == set(kept)
        assert_near(tiny_model.run(tokens, skip=skip).logits, full.logits)


def test_sites_inside_a_skipped_block(tiny_model: LanguageModel) -> None:
    tokens = tiny_model.tokenize(TEXTS)
    x = torch.zeros(4, 7, 32)
    with pytest.raises(UserError, match="'mlp_0' is inside a skipped block"):
        tiny_model.run(tokens, skip={RESID_0: x}, capture=[MLP_0])
    both = tiny_model.run(tokens, skip={RESID_0: x, MLP_0: x + 7})  # the inner one is never reached
    assert torch.equal(both.logits, tiny_model.run(tokens, skip={RESID_0: x}).logits)
    with pytest.raises(UserError, match=r"skip tensor of site 'resid_0'.*shape \[3, 7, 32\]"):
        tiny_model.run(tokens, skip={RESID_0: x[:3]})


# ---- gradients


@pytest.mark.parametrize("architecture", ["gpt2", "gpt_neox"])
def test_gradients_equal_those_of_torch_hooks(architecture: str, make_tiny_model: Callable[..., LanguageModel]) -> None:
    model, bare = make_tiny_model(architecture), tiny_hf(architecture).requires_grad_(False)
    tokens = model.tokenize(TEXTS)
    seen: dict[str, Tensor] = {}

    def keep(path: str) -> Callable[[Tensor], Tensor]:
        def edit(x: Tensor) -> Tensor:
            seen[path] = x if seen else x.detach().requires_grad_(True)
            return seen[path]

        return edit

    paths = [path.module for path in model.site_paths.values()]
    with torch_hooks(bare, {path: keep(path) for path in paths}):
        out = bare(tokens.input_ids, attention_mask=tokens.attention_mask, position_ids=tokens.position_ids).logits
    expected = torch.autograd.grad(out[:, -1, 5].sum() - out[:, -1, 9].sum(), [seen[path] for path in paths])

    run = model.run(tokens, capture=model.sites, grad=True)
    metric = run.logits[:, -1, 5].sum() - run.logits[:, -1, 9].sum()
    found = torch.autograd.grad(metric, list(run.activations.values()), retain_graph=True)
    for site, ours, theirs in zip(model.sites, found, expected, strict=True):
        assert_near(ours, theirs, msg=site)
    again = torch.autograd.grad(metric, run.activations[RESID_0])[0]  # the graph is alive after the run
    assert_near(again, expected[paths.index(model.site_paths[RESID_0].module)])


def test_cut_sites_have_direct_gradients_only(tiny_model: LanguageModel) -> None:
    """Every site replaced by a leaf: block 1 sees attn_0 through resid_0's leaf alone, so there is no gradient."""
    leaves: dict[Site, Tensor] = {}

    def cut(site: Site) -> Callable[[Tensor], Tensor]:
        return lambda x: leaves.setdefault(site, x.detach().requires_grad_(True))

    before: dict[Site, Tensor] = {}

    def cut_and_keep(site: Site) -> Callable[[Tensor], Tensor]:
        return lambda x: cut(site)(before.setdefault(site, x))

    edits = {site: cut_and_keep(site) for site in tiny_model.sites}
    run = tiny_model.run(tiny_model.tokenize(TEXTS), edits=edits, capture=tiny_model.sites, grad=True)
    assert all(run.activations[site] is leaves[site] for site in tiny_model.sites)
    parents = torch.autograd.grad(before[Site("mlp", 1)].sum(), list(leaves.values()), allow_unused=True)
    assert [site.name for site, g in zip(leaves, parents, strict=True) if g is not None] == ["resid_0"]
    parents = torch.autograd.grad(before[Site("resid", 1)].sum(), list(leaves.values()), allow_unused=True)
    assert [s.name for s, g in zip(leaves, parents, strict=True) if g is not None] == ["resid_0", "attn_1", "mlp_1"]


def test_no_graph_without_grad_and_no_trainable_parameter(tiny_model: LanguageModel) -> None:
    run = tiny_model.run(tiny_model.tokenize(TEXTS), capture=tiny_model.sites)
    assert not run.logits.requires_grad
    assert not any(x.requires_grad for x in run.activations.values())
    assert not any(parameter.requires_grad for parameter in tiny_model.hf.parameters())
    assert not tiny_model.hf.training


# ---- generation


def test_generation_with_edits_equals_nnsight_and_step_by_step(model: LanguageModel) -> None:
    tokens, n_new = model.tokenize(TEXTS), 5
    edits = dict.fromkeys(model.sites, odd_edit)
    generated = model.generate(tokens, max_new_tokens=n_new, min_new_tokens=n_new, edits=edits)

    ids, mask = tokens.input_ids, tokens.attention_mask
    for _ in range(n_new):
        logits = model.run(Tokens(ids, mask), edits=edits, last_only=True).logits[:, -1]
        logits[:, model.tokenizer.eos_token_id] = -torch.inf
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], dim=1)
        mask = torch.cat([mask, torch.ones(len(tokens), 1, dtype=mask.dtype)], dim=1)
    assert torch.equal(generated, ids)

    bare = tiny_hf(model.hf.config.model_type)
    wrapped = TransformersModel(bare, tokenizer=word_tokenizer(), device="cpu")
    envoys = [wrapped.get(path.module) for path in model.site_paths.values()]
    with wrapped.generate(max_new_tokens=n_new, min_new_tokens=n_new, do_sample=False) as tracer:
        with tracer.invoke(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask):
            for _step in tracer.iter[:n_new]:
                for envoy in envoys:
                    envoy.output = replaced(envoy.output, odd_edit(first(envoy.output)))
        with tracer.invoke():
            expected = tracer.result.save()
    assert torch.equal(generated, expected)
    assert not torch.equal(generated, model.generate(tokens, max_new_tokens=n_new, min_new_tokens=n_new))


def test_generation_shapes_and_clean_up(tiny_model: LanguageModel) -> None:
    tokens = tiny_model.tokenize(TEXTS)
    shapes: list[tuple[int, ...]] = []

    def look(x: Tensor) -> Tensor:
        shapes.append(tuple(x.shape))
        return x

    tiny_model.generate(tokens, max_new_tokens=3, min_new_tokens=3, edits={RESID_0: look})
    assert shapes == [(4, 7, 32), (4, 1, 32), (4, 1, 32)]
    with pytest.raises(UserError, match="edit at site 'resid_0' gave shape"):
        tiny_model.generate(tokens, max_new_tokens=1, edits={RESID_0: lambda x: x[:1]})
    tiny_model.generate(tokens, max_new_tokens=1)  # the failed edit is gone
    assert len(shapes) == 3
