"""Triton's kernels against their twins in torch: on a GPU where there is one, else on a CPU in Triton's interpreter."""

import importlib
import inspect
import os
import runpy
import sys
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch.fx.experimental import _config as fx_config

from sae.errors import UserError
from sae.model.sites import Site
from sae.sparse import activations
from sae.sparse.activations import SparseActs
from sae.sparse.encoder_pass import above
from sae.training.config import TrainConfig
from sae.training.training_sae import TrainingSAE

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LENGTHS = {
    "mixed": [3, 0, 1, 7, 2],
    "empty": [0, 0, 0],
    "one": [5],
    "exact": [8, 8, 16, 8],
    "long": [9, 0, 2, 8, 9, 26, 1, 0],
}
"""Entries of each bag; windows have eight."""
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


@cache
def builtins(owner):
    """The members that the interpreter looks for."""
    is_builtin = importlib.import_module("triton.language.core").is_builtin
    return [(name, member) for name, member in inspect.getmembers(owner) if is_builtin(member)]


def patch_interpreter(monkeypatch):
    """Triton's interpreter looks through its whole language before every kernel and every function that one calls, and
    puts its own members there, which takes longer than most kernels here: once a kernel is enough, and looking once.
    """
    interpreter = pytest.importorskip("triton.runtime.interpreter", reason="Triton is not installed")
    inspecting = ModuleType("inspect")
    inspecting.__dict__.update(vars(inspect) | {"getmembers": builtins})
    monkeypatch.setattr(interpreter, "inspect", inspecting)
    language, patch = importlib.import_module("triton.language"), interpreter._patch_lang
    both = SimpleNamespace(__globals__={"tl": language, "core": language.core})
    monkeypatch.setattr(interpreter, "_patch_lang", lambda fn: patch(both))
    monkeypatch.setattr(interpreter.InterpretedFunction, "__call__", lambda self, *a, **k: self.rewrite()(*a, **k))


@pytest.fixture
def members_once(monkeypatch):
    patch_interpreter(monkeypatch)


@pytest.fixture
def kernels(monkeypatch, members_once):
    """`sae.sparse.triton_kernels` with windows of eight entries, at work wherever `sae.sparse.activations` is asked."""
    pytest.importorskip("triton", reason="Triton is not installed")
    if DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("there is no GPU, and TRITON_INTERPRET is not 1")
    from sae.sparse import triton_kernels as kernels

    monkeypatch.setattr(kernels, "WINDOW", 8)
    with activations.using("triton"):
        yield kernels


def make_bags(lengths, d, dtype=torch.float32):
    """source, index, offsets, weight, rows, and the bag of each entry."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor(lengths)
    n = int(lengths.sum())
    tensors = {
        "source": torch.randn(20, d, generator=generator).to(dtype),
        "index": torch.randint(20, (n,), generator=generator),
        "offsets": torch.nn.functional.pad(lengths.cumsum(0), (1, 0)),
        "weight": torch.randn(n, generator=generator).to(dtype),
        "rows": torch.randn(len(lengths), d, generator=generator).to(dtype),
        "bag": torch.arange(len(lengths)).repeat_interleave(lengths),
    }
    return {name: tensor.to(DEVICE) for name, tensor in tensors.items()}


def assert_bags_agree(kernels, bags):
    source, index, offsets, weight = (bags[name] for name in ("source", "index", "offsets", "weight"))
    out, dots = kernels.bag_sum_and_dots(source, index, offsets, weight, bags["rows"])
    alone = kernels.weighted_segment_sum(source, index, offsets, weight)
    x = source[index].double()
    expected = torch.zeros(len(offsets) - 1, source.shape[1], dtype=torch.float64, device=DEVICE)
    expected.index_add_(0, bags["bag"], weight.double()[:, None] * x)
    tolerance = TOLERANCE[source.dtype]
    assert out.dtype == dots.dtype == source.dtype
    assert torch.equal(out, alone)  # the same order of additions
    torch.testing.assert_close(out.double(), expected, atol=tolerance * 10, rtol=tolerance)
    expected_dots = (x * bags["rows"].double()[bags["bag"]]).sum(1)
    torch.testing.assert_close(dots.double(), expected_dots, atol=tolerance * 10, rtol=tolerance)
    with activations.using("torch"):
        twin = activations.weighted_segment_sum(source, index, offsets, weight)
    assert twin.dtype == out.dtype
    torch.testing.assert_close(out, twin, atol=tolerance * 10, rtol=tolerance)


@pytest.mark.parametrize(
    ("lengths", "d"), [*((name, 7) for name in LENGTHS), ("mixed", 1), ("mixed", 64), ("mixed", 96)]
)
def test_bags_are_summed_as_in_torch(kernels, lengths, d):
    assert_bags_agree(kernels, make_bags(LENGTHS[lengths], d))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rows_of_half_precision_are_summed_in_single(kernels, dtype):
    assert_bags_agree(kernels, make_bags(LENGTHS["long"], 40, dtype))


def test_rows_may_lie_apart_or_on_top_of_each_other(kernels):
    bags = make_bags([12, 0, 3], 12)
    for source in (
        bags["source"].T.contiguous().T,
        bags["source"].repeat(1, 2)[:, :12],
        bags["source"][:1].expand(20, 12),
    ):
        assert_bags_agree(kernels, bags | {"source": source, "rows": bags["rows"].T.contiguous().T})


def test_the_same_bags_give_the_same_bits(kernels):
    bags = make_bags([40, 3, 20], 16)
    arguments = [bags[name] for name in ("source", "index", "offsets", "weight")]
    assert torch.equal(kernels.weighted_segment_sum(*arguments), kernels.weighted_segment_sum(*arguments))


@pytest.mark.parametrize(("d", "width"), [(2304, 2304), (3584, 4096), (512, 512), (768, 768), (1, 1)])
def test_tiles_hold_a_whole_row(d, width):
    pytest.importorskip("triton", reason="Triton is not installed")
    from sae.sparse.triton_kernels import Shape

    shape = Shape.of(d)
    assert shape.left + shape.right == width
    assert all(size & (size - 1) == 0 for size in (shape.height, shape.left, shape.right, shape.warps))


@pytest.mark.parametrize("d", [1, 33, 64])
def test_projection_and_normalisation_are_those_of_torch(kernels, d):
    generator = torch.Generator().manual_seed(0)
    unit, gradient = (torch.randn(9, d, generator=generator).to(DEVICE) for _ in range(2))
    unit[4] = 0
    twin, twin_gradient = unit.clone(), gradient.clone()
    activations.normalize_rows_(unit)
    activations.remove_parallel_(gradient, unit)
    with activations.using("torch"):
        activations.normalize_rows_(twin)
        activations.remove_parallel_(twin_gradient, twin)
    torch.testing.assert_close(unit, twin)
    torch.testing.assert_close(gradient, twin_gradient, atol=1e-5, rtol=1e-5)


def test_a_code_without_entries_has_zero_sums_and_gradients(kernels):
    index = torch.empty(0, dtype=torch.int64, device=DEVICE)
    acts = SparseActs(index, index, torch.empty(0, device=DEVICE), n_tokens=3, n_features=6)
    weights = [torch.randn(6, 5, device=DEVICE, requires_grad=True) for _ in range(2)]
    out = acts.decode(acts.encode(weights[0], None, None, torch.randn(3, 5, device=DEVICE)), weights[1])
    assert torch.equal(out, torch.zeros(3, 5, device=DEVICE))
    out.square().sum().backward()
    assert all(torch.equal(w.grad, torch.zeros_like(w)) for w in weights)


@pytest.mark.parametrize(("levels", "frozen"), [(3, "nothing"), (1, "values"), (1, "rows")])
def test_gradients_of_sparse_activations_are_those_of_the_matrix(kernels, levels, frozen):
    z = torch.randn(9, 6, device=DEVICE)
    z[:, 3] = z[:, 3].abs() + 1  # a feature of every token: a long bag
    acts = above(z, 0.4)
    acts = acts if levels == 1 else acts.at_levels(acts.feature % levels, levels)
    value = acts.z.clone().requires_grad_(frozen != "values")
    W_dec = torch.randn(6, 10, device=DEVICE, requires_grad=frozen != "rows")
    g = torch.randn(levels, 9, 10, device=DEVICE)
    f = torch.zeros(levels, 9, 6, device=DEVICE)
    place = (torch.zeros_like(acts.token) if acts.level is None else acts.level), acts.token, acts.feature
    expected = f.index_put(place, value) @ W_dec
    out = acts.decode(value, W_dec).view(levels, 9, 10)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    for leaf in (value, W_dec):
        if leaf.requires_grad:
            (mine,) = torch.autograd.grad(out, leaf, g, retain_graph=True)
            (its,) = torch.autograd.grad(expected, leaf, g, retain_graph=True)
            torch.testing.assert_close(mine, its, atol=1e-5, rtol=1e-5)


def one_step(name, *, cast, dead, mode):
    """Weights with gradients, and state, after a step in the middle of training and the constraints after it."""
    torch.manual_seed(0)
    config = TrainConfig(architecture=name, features=10, k=3, batch_size=4, tokens=4_000, sparsity=0.01, aux_k=4)
    one = TrainingSAE("site", Site.parse("resid_0"), 8, config, torch.device(DEVICE))
    x = torch.randn(4, 8, device=DEVICE) + torch.randn(8, device=DEVICE)
    one.prepare(x)
    one.state["l0"].fill_(1)  # the sparse step of architectures that have two
    if dead:
        one.state["silent"][::2] = 10**9
    with activations.using(mode), torch.autocast(DEVICE, torch.bfloat16) if cast else nullcontext():
        one.step(x, 480)
        gradients = {key: weight.grad.clone() for key, weight in one.weights.items()}
        with torch.no_grad():
            one.weights["W_dec"].mul_(1.5)
        one.constrain()
    return gradients | {f"weight {key}": weight.detach() for key, weight in one.weights.items()} | one.state


@pytest.mark.parametrize("name", ["topk", "topk+auxk", "topk in autocast", "matryoshka", "jumprelu", "gated"])
def test_a_step_is_the_same_with_and_without_kernels(kernels, name):
    cast, dead, name = name.endswith("autocast"), name.endswith("auxk"), name.split("+")[0].split()[0]
    mine, twin = (one_step(name, cast=cast, dead=dead, mode=mode) for mode in ("triton", "torch"))
    assert twin["W_dec"].abs().max() > 0
    for key, expected in twin.items():
        assert mine[key].dtype == expected.dtype
        torch.testing.assert_close(
            mine[key], expected, atol=2e-5, rtol=2e-5, msg=lambda text, key=key: f"{key}: {text}"
        )


def test_every_use_of_rows_asks_for_the_kernels(kernels, monkeypatch):
    used, functions = set(), ("weighted_segment_sum", "bag_sum_and_dots", "remove_parallel_", "normalize_rows_")
    for function in functions:
        original = getattr(kernels, function)
        monkeypatch.setattr(kernels, function, lambda *a, f=original: (used.add(f.__name__), f(*a))[1])
    one_step("topk", cast=False, dead=False, mode="triton")
    assert used == set(functions)
    used.clear()
    one_step("topk", cast=False, dead=False, mode="torch")
    if DEVICE == "cpu":
        one_step("topk", cast=False, dead=False, mode="auto")
    assert not used


def test_kernels_that_are_wrong_are_found(kernels, monkeypatch):
    kernels.check(DEVICE)
    monkeypatch.setattr(
        kernels,
        "_owners",
        lambda offsets, n, n_windows: torch.zeros(2 * n_windows, dtype=torch.int64, device=offsets.device),
    )
    torch.use_deterministic_algorithms(True)  # fills new memory with NaN: it may hold the right numbers of before
    try:
        with pytest.raises(AssertionError):
            kernels.check(DEVICE)
    finally:
        torch.use_deterministic_algorithms(False)


def test_an_unknown_choice_of_kernels_is_told():
    message = "SFC_KERNELS is 'cuda', allowed are auto, torch, triton"
    with activations.using("cuda"), pytest.raises(UserError, match=message):
        activations.kernels_for(torch.zeros(1))


def test_kernels_that_nothing_can_run_are_told(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with activations.using("triton"), pytest.raises(UserError, match="Triton has no code for 'cpu'"):
        activations.kernels_for(torch.zeros(1))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setitem(sys.modules, "sae.sparse.triton_kernels", None)  # as where Triton is not installed
    with activations.using("triton"), pytest.raises(UserError, match="Triton cannot be imported"):
        activations.kernels_for(torch.zeros(1))


def test_numbers_of_double_precision_stay_with_torch(kernels):
    assert activations.kernels_for(torch.zeros(2, 2, dtype=torch.float64)) is None


@pytest.mark.parametrize("name", ["topk", "batchtopk", "matryoshka"])
def test_a_step_on_a_gpu_waits_for_sizes_of_a_selection_only(name, monkeypatch):
    """On the meta device nothing has a value, so whatever the host asks for raises; nonzero is let through."""
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)
    monkeypatch.setattr(torch, "autocast", lambda *a, **k: nullcontext())
    config = TrainConfig(architecture=name, features=512, k=16, batch_size=64, tokens=64_000)
    one = TrainingSAE("site", Site.parse("resid_0"), 32, config, torch.device("meta"))
    monkeypatch.setattr(torch, "tensor", None)  # torch waits until a number of the host is copied
    with fx_config.patch(meta_nonzero_assume_all_nonzero=name != "topk"):
        one.step(torch.randn(64, 32, device="meta"), 1)
    one.constrain()
    assert one.weights["W_enc"].grad.shape == (512, 32)


def compile_kernels():
    """In a process that has imported Triton as its interpreter, of which the compiled part alone may stay."""
    for name in [name for name in sys.modules if name.startswith("triton") and not name.startswith("triton._C")]:
        del sys.modules[name]
    runpy.run_path(str(Path(__file__).with_name("compile_kernels.py")), run_name="__main__")


@pytest.mark.slow
def test_kernels_compile_for_hopper(forked, tmp_path):
    pytest.importorskip("triton", reason="Triton is not installed")
    environment = {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    run = forked.call(compile_kernels, environment=environment)
    assert run.status == 0, run.err
    assert run.out.split() == ["_bag_sum", "_bag_sum", "_add_parts", "_project", "_normalise"]
