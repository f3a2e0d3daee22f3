"""Time node attribution, edges and the whole circuit on a GPT-NeoX of 6 layers and width 512.

`python -m tests.benchmarks.bench_circuit` prints, for 19 sites with SAEs of 4,096 features and 32 prompt pairs of 8
tokens, medians over `--repeats` interleaved rounds, each also as a ratio to one bare forward and backward pass of the
model on the same batch, and the process's peak memory over model and SAEs. The model and the SAEs are random: half of
the features are active at a token, which is the worst case, and trained SAEs are faster. `edges` are those among 100
nodes by themselves; a `circuit` is the whole, from tokens to edges, where the node pass leaves the edges what it knows.

Integrated gradients come with their quadrature error: the relative error (L2, mean over sites) of all effects against
Gauss-Legendre with 12 nodes, and the completeness residual, a share of the total effect, in which errors cancel.

    python -m tests.benchmarks.bench_circuit --peer feature_circuits=PYTHON,CHECKOUT

times the paper's code beside: github.com/saprmarks/feature-circuits in CHECKOUT, run by the PYTHON of an environment
that has what it needs (nnsight 0.3.7, transformers 4.49, dictionary-learning 0.1.0, graphviz), in a process of its
own, with the same model, SAEs, prompts and number of threads (`paper_steps`). Its steps run in the same rounds, and
only then is there a speed-up: the ratio of medians of this run. That both compute the same is shown first, by the
relative difference (L2) of all effects under its rule. Its circuit always stands on integrated gradients by the left
Riemann sum with 10 nodes: that time is compared with every circuit of ours.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as `sfc` does, before torch is imported

import argparse
import json
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from circuits.attribution.activations import ActivationPair, Setting, capture_activations, site_total_effect
from circuits.attribution.edges import edge_effects
from circuits.attribution.feature_effects import contract
from circuits.attribution.node_effects import Attribution, attribute
from circuits.attribution.nodes import Nodes, aggregate, select_nodes
from circuits.discovery.batching import lanes_rows, max_rows
from circuits.metrics.metrics import logit_difference
from circuits.prompts.dataset import PromptSet
from sae.autoencoder import SAEConfig, SparseAutoencoder
from sae.model.language_model import LanguageModel, Tokens
from sae.model.load import load_model
from sae.model.sites import Site
from tests.benchmarks import paper_steps

PAPERS_RULE = "IG, left Riemann 10"
BARE = "bare forward + backward"
PAPERS_STEPS = {
    "attribution patching": "attribution patching", "integrated gradients": PAPERS_RULE, "edges": "edges",
    "circuit": "circuit",
}  # fmt: skip
"""What the paper's code takes seconds for, and what that is called here."""
RULES = {
    PAPERS_RULE: ("left-riemann", 10),
    "IG, midpoint 10": ("midpoint", 10),
    "IG, midpoint 3": ("midpoint", 3),
    "IG, midpoint 2": ("midpoint", 2),
    "IG, Gauss-Legendre 2": ("gauss-legendre", 2),
}
ADAPTIVE = (0.01,)
FINE = 12
"""Gauss-Legendre nodes of the reference for quadrature errors."""


def make_model(layers: int, width: int, vocab: int, device: str) -> LanguageModel:
    torch.manual_seed(0)
    config = GPTNeoXConfig(
        vocab_size=vocab,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=8,
        intermediate_size=4 * width,
        max_position_embeddings=64,
        initializer_range=0.05,
    )
    return load_model(GPTNeoXForCausalLM(config).eval(), device=device)


def make_saes(model: LanguageModel, n_features: int) -> dict:
    saes = {}
    for seed, site in enumerate(model.sites):
        generator = torch.Generator().manual_seed(seed)
        rows = torch.randn(n_features, model.d_model, generator=generator)
        rows /= rows.norm(dim=1, keepdim=True)
        tensors = {"W_enc": rows, "b_enc": torch.zeros(n_features), "W_dec": rows, "b_dec": torch.zeros(model.d_model)}
        config = SAEConfig("relu", model.d_model, n_features, site.name)
        saes[site] = SparseAutoencoder(config, tensors).to(model.device)
    return saes


def make_prompts(n: int, length: int, vocab: int, device: str) -> PromptSet:
    generator = torch.Generator().manual_seed(0)
    clean = torch.randint(vocab, (n, length), generator=generator)
    patch = clean.clone()
    patch[:, 1] = torch.randint(vocab, (n,), generator=generator)
    ones = torch.ones_like(clean)
    answers = torch.randint(vocab, (2, n), generator=generator)
    return PromptSet(
        Tokens(clean, ones), Tokens(patch, ones), *answers, cases=[""] * n, templates=[""] * n, texts=[""] * n
    ).to(device)


class Bench:
    """The steps of a circuit on one batch, each as a function to time."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.model = make_model(args.layers, args.width, args.vocab, args.device)
        self.saes = make_saes(self.model, args.features)
        self.prompts = make_prompts(args.prompts, args.length, args.vocab, args.device)
        self.rows = max_rows(self.model, args.length, memory=args.memory)
        self.sites = self.model.sites
        self.top = args.nodes
        self.states = self.capture()
        self.found = self.attribute(self.states, method="attrib")
        self.nodes = self.select(self.found)

    def capture(self) -> ActivationPair:
        return capture_activations(
            Setting(self.model, self.saes, logit_difference), self.prompts, sites=self.sites, gradient=True
        )

    def attribute(self, states: ActivationPair, *, active: str | None = None, **options) -> Attribution:
        return attribute(states, sites=self.sites, max_rows=self.rows, totals=False, active=active, **options)

    def select(self, found: Attribution) -> Nodes:
        n, n_positions = len(self.prompts), self.prompts.clean.n_positions
        return select_nodes(aggregate(found.effects, n_examples=n, n_positions=n_positions), top=self.top)

    def edges_from(self, found: Attribution, nodes: Nodes) -> None:
        rows = lanes_rows(self.rows, found.states.mask.shape[1], self.model.device)
        edge_effects(found, nodes, max_rows=rows)

    def bare(self) -> None:
        """One forward and backward pass of the model itself, gradient at the embedding."""
        ids = self.prompts.clean.input_ids
        x = self.model.hf.get_input_embeddings()(ids).detach().requires_grad_()
        logits = self.model.hf(inputs_embeds=x, logits_to_keep=1, use_cache=False).logits
        torch.autograd.grad(logit_difference(logits[:, -1], self.prompts).sum(), x)

    def node_pass(self, **options) -> None:
        """Activations of both runs and the effects of all nodes."""
        self.select(self.attribute(self.capture(), **options))

    def edges(self) -> None:
        """Edges by themselves, with nothing known from a node pass but its gradients."""
        self.edges_from(self.found, self.nodes)

    def circuit(self, **options) -> None:
        """Everything: nodes and the edges among the strongest of them."""
        states = self.capture()
        found = self.attribute(states, active="clean", **options)
        self.edges_from(found, self.select(found))

    def errors(self, reference: Mapping[Site, torch.Tensor], **options) -> tuple[float, float]:
        """Of integrated gradients, means over sites: the relative error of all effects (L2) against a fine
        quadrature's gradients, and the completeness residual |sum of effects - measured| / |total effect|.
        """
        states = self.states
        total = (states.m_patch - states.m_clean).mean().abs()
        gradients = self.attribute(states, **options).gradients
        errors, residuals = [], []
        for site in self.sites:
            off, whole = (
                contract(states, g, site=site)[0].value.norm()
                for g in (gradients[site] - reference[site], reference[site])
            )
            if whole > 0:  # nothing flows from the patched position to some sites of a single layer
                errors.append((off / whole).item())
            summed = ((states.patch[site] - states.clean[site]) * gradients[site]).sum((1, 2)).mean()
            measured = site_total_effect(states, site=site).mean()
            residuals.append(((summed - measured).abs() / total).item())
        return statistics.mean(errors), statistics.mean(residuals)


def seconds(function, device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def peak_mb(device: str) -> float:
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale / 2**20


class PapersCode:
    """The paper's code in a process of its own, on the files of a folder."""

    def __init__(self, python: str, checkout: str, bench: Bench, folder: Path) -> None:
        self.folder = folder
        write_inputs(bench, folder)
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        environment |= {"OMP_NUM_THREADS": str(torch.get_num_threads()), "OMP_WAIT_POLICY": "PASSIVE"}
        self.process = subprocess.Popen(
            [python, str(Path(paper_steps.__file__).resolve())], cwd=checkout, env=environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        self.ask(
            {"folder": str(folder), "threads": torch.get_num_threads(), "nodes": bench.top}
            | {"device": str(bench.model.device)}
        )

    def ask(self, request: Any) -> dict[str, Any]:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        return json.loads(line) if line else sys.exit(f"the paper's code failed at {request}; what it said is above")

    def times(self) -> dict[str, float]:
        """Seconds of its steps, once, by our names."""
        taken = self.ask("attribution patching") | self.ask("circuit")
        return {PAPERS_STEPS[name]: value for name, value in taken.items()}

    def difference(self, bench: Bench) -> float:
        """The relative difference (L2) of all effects by integrated gradients, ours and its, at the worst site."""
        self.ask("effects")
        theirs = load_file(self.folder / paper_steps.NODE_EFFECTS)
        rule, steps = RULES[PAPERS_RULE]
        ours = bench.attribute(bench.states, method="ig", rule=rule, steps=steps).effects
        worst = 0.0
        for site, effects in ours.items():
            dense = torch.zeros_like(theirs[site.name])
            dense[effects.example.long(), effects.position.long(), effects.feature.long()] = effects.value.cpu()
            worst = max(worst, ((dense - theirs[site.name]).norm() / theirs[site.name].norm()).item())
        return worst


def write_inputs(bench: Bench, folder: Path) -> None:
    """The model, SAEs and prompts of a benchmark, as `paper_steps` reads them."""
    config = bench.model.hf.config
    names = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
             "max_position_embeddings", "layer_norm_eps", "use_parallel_residual")  # fmt: skip
    facts = {name: getattr(config, name) for name in names}
    (folder / "facts.json").write_text(json.dumps({"model": facts}))
    weights = {
        name.replace("lm_head.", "embed_out."): x.contiguous() for name, x in bench.model.hf.state_dict().items()
    }
    save_file(weights, folder / "model.safetensors")
    tensors = {f"{site}.{name}": x.clone() for site, sae in bench.saes.items() for name, x in sae.named_buffers()}
    save_file(tensors, folder / "saes.safetensors")
    prompts = bench.prompts
    answers = torch.stack([prompts.clean_answers, prompts.patch_answers], 1)
    save_file(
        {"clean": prompts.clean.input_ids, "patch": prompts.patch.input_ids, "answers": answers},
        folder / "prompts.safetensors",
    )


def print_times(
    median: dict[str, float], papers: dict[str, float], errors: dict[str, tuple[float, float]], circuits: set[str]
) -> None:
    """One line a step; the paper's seconds and the speed-up only where both were measured."""
    header = f"{'':36} {'seconds':>9} {'x bare':>8}"
    header += f" {'paper s':>8} {'speed-up':>9}" if papers else ""
    print(f"{header} {'error':>8} {'residual':>9}")
    for name, value in median.items():
        line = f"{name:36} {value:9.3f} {value / median[BARE]:8.1f}"
        paper = papers.get("circuit" if name in circuits else name)
        if papers:
            line += f" {paper:8.2f} {paper / value:8.1f}x" if paper else " " * 19
        found = errors.get(name.removeprefix("circuit, "))
        print(line + (f" {found[0]:8.4f} {found[1]:9.5f}" if found else ""))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, value in {"layers": 6, "width": 512, "features": 4096, "prompts": 32, "length": 8, "vocab": 5000}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--nodes", type=int, default=100, help="nodes between which edges are computed")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--memory", type=float, default=2.0, help="budget in GiB, as sfc discover --memory")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of both sides")
    parser.add_argument("--peer", metavar="feature_circuits=PYTHON,CHECKOUT", help="time the paper's code beside")
    args = parser.parse_args()
    if args.peer is not None and not re.fullmatch(r"feature_circuits=[^,]+,[^,]+", args.peer):
        parser.error(f"--peer is {args.peer!r}, wanted is feature_circuits=PYTHON,CHECKOUT")
    return args


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    bench = Bench(args)
    before = peak_mb(args.device)
    rules = {name: {"method": "ig", "rule": rule, "steps": steps} for name, (rule, steps) in RULES.items()}
    rules |= {f"IG, adaptive to {residual}": {"method": "ig-adaptive", "residual": residual} for residual in ADAPTIVE}
    single = {"attribution patching": {"method": "attrib"}, "RelP": {"method": "relp"}}
    steps: dict[str, Callable] = {
        BARE: bench.bare,
        "attribution patching": partial(bench.node_pass, **single["attribution patching"]),
        PAPERS_RULE: partial(bench.node_pass, **rules[PAPERS_RULE]),
        "edges": bench.edges,
    }
    circuits = {f"circuit, {name}": options for name, options in (rules | single).items()}
    steps |= {name: partial(bench.circuit, **options) for name, options in circuits.items()}
    times: dict[str, list[float]] = {name: [] for name in steps}
    papers: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        peer = PapersCode(*args.peer.partition("=")[2].split(","), bench, Path(folder)) if args.peer else None
        if peer is not None:
            print(f"effects differ from the paper's code by {peer.difference(bench):.1e} (L2, worst site)", flush=True)
        for _ in range(args.repeats):
            for name, function in steps.items():
                times[name].append(seconds(function, args.device))
            for name, value in (peer.times() if peer is not None else {}).items():
                papers.setdefault(name, []).append(value)
    median, of_paper = ({k: statistics.median(v) for k, v in taken.items()} for taken in (times, papers))
    peak = peak_mb(args.device) - before
    fine = bench.attribute(bench.states, method="ig", rule="gauss-legendre", steps=FINE).gradients
    errors = {name: bench.errors(fine, **options) for name, options in rules.items()}
    print_times(median, of_paper, errors, set(circuits))
    print(f"peak memory over model and SAEs: {peak:.0f} MB")


if __name__ == "__main__":
    main()
