"""The benchmark of circuits claims a speed-up only over what it timed itself; the paper's code gets what ours gets."""

from __future__ import annotations

import io
import json
import sys
from argparse import Namespace
from collections import namedtuple
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from tests.benchmarks import paper_steps
from tests.benchmarks.bench_circuit import BARE, Bench, print_times, write_inputs

MEDIAN = {BARE: 0.5, "attribution patching": 1.0, "circuit, RelP": 2.0}


def test_without_the_papers_code_there_is_no_speed_up(capsys):
    print_times(MEDIAN, {}, {}, {"circuit, RelP"})
    assert not {"speed-up", "paper"} & set(capsys.readouterr().out.split())


def test_speed_ups_are_ratios_of_what_was_measured(capsys):
    print_times(MEDIAN, {"attribution patching": 3.0, "circuit": 7.0}, {}, {"circuit, RelP"})
    lines = {line[:36].strip(): line.split() for line in capsys.readouterr().out.splitlines()}
    assert lines["attribution patching"][-2:] == ["3.00", "3.0x"] and lines["circuit, RelP"][-2:] == ["7.00", "3.5x"]
    assert lines[BARE][-2:] == ["0.500", "1.0"]


class Dictionary(torch.nn.Module):
    """Stands for dictionary_learning's."""

    def __init__(self, width: int, n_features: int) -> None:
        super().__init__()
        self.bias = torch.nn.Parameter(torch.empty(width))
        self.encoder = torch.nn.Linear(width, n_features)
        self.decoder = torch.nn.Linear(n_features, width, bias=False)


@pytest.fixture
def checkout(monkeypatch):
    """Modules of the names and signatures of the paper's code; the calls they get."""
    calls = []

    def patching_effect(clean, patch, model, submodules, dictionaries, metric_fn, method="attrib", **options):
        calls.append((method, [submodule.name for submodule in submodules]))
        effects = {one: SimpleNamespace(to_tensor=lambda: torch.arange(6.0).view(1, 2, 3)) for one in submodules}
        return SimpleNamespace(effects=effects)

    def get_circuit(clean, patch, model, embed, attns, mlps, resids, dictionaries, metric_fn, **options):
        calls.append(options)
        circuit.patching_effect(clean, patch, model, [embed, *attns], dictionaries, metric_fn, method="ig")

    circuit = SimpleNamespace(get_circuit=get_circuit, patching_effect=patching_effect)
    submodule = namedtuple("Submodule", ["name", "submodule", "is_tuple"], defaults=[False])
    for name, module in {
        "attribution": SimpleNamespace(patching_effect=patching_effect),
        "circuit": circuit,
        "loading_utils": SimpleNamespace(Submodule=submodule),
        "dictionary_learning": SimpleNamespace(AutoEncoder=Dictionary),
    }.items():
        monkeypatch.setitem(sys.modules, name, module)
    return calls


def test_the_papers_code_is_called_with_our_inputs(checkout, tmp_path):
    sizes = {"layers": 1, "width": 16, "features": 8, "prompts": 2, "length": 4, "vocab": 20, "nodes": 3}
    bench = Bench(Namespace(**sizes, memory=1.0, device="cpu"))
    write_inputs(bench, tmp_path)
    given = {"folder": str(tmp_path), "threads": torch.get_num_threads(), "nodes": 4, "device": "cpu"}
    answers = io.StringIO()
    steps = ["attribution patching", "circuit", "effects"]
    paper_steps.serve(io.StringIO("\n".join(map(json.dumps, [given, *steps]))), answers)
    facts, attrib, circuit, _ = map(json.loads, answers.getvalue().splitlines())
    assert facts["torch"] and attrib.keys() == {"attribution patching"}
    assert circuit["circuit"] == pytest.approx(circuit["integrated gradients"] + circuit["edges"])
    sites = ["embed", "attn_0", "mlp_0", "resid_0"]
    assert checkout[0] == ("attrib", sites) and checkout[1] == ("ig", sites)
    assert checkout[2] == {"parallel_attn": True, "node_threshold": 4.0}  # 24 effects, 0 to 5 at each of four sites
    assert load_file(tmp_path / paper_steps.NODE_EFFECTS).keys() == set(sites)
    code = paper_steps.PaperCode(tmp_path, 4, "cpu")
    ids, sae = bench.prompts.clean.input_ids, bench.saes[bench.model.sites[0]]
    torch.testing.assert_close(code.model._module(ids).logits, bench.model.hf(ids).logits)
    theirs = code.dictionaries[code.modules["embed"]]
    assert torch.equal(theirs.encoder.weight, sae.W_enc) and torch.equal(theirs.decoder.weight.T, sae.W_dec)
