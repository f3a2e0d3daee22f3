"""Time node attribution, edges and the whole circuit on a GPT-NeoX of 6 layers and width 512.

`python -m tests.benchmarks.bench_circuit` prints, for 19 sites with SAEs of 4,096 features and 32 prompt pairs of 8
tokens, medians over `--repeats` interleaved rounds, each also as a ratio to one bare forward and backward pass of the
model on the same batch, and the process's peak memory over model and SAEs. The model and the SAEs are random; every
quantity is exact arithmetic, so their values do not matter.

The paper's code on the same shapes and two CPU cores (recorded once, quiet machine): attribution patching 1.65 s,
integrated gradients 84.1 s, edges 28.9 s, circuit 113 s.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import sys
import time
from collections.abc import Callable

import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from circuits.attribution import capture_states, contract_gradient
from circuits.attribution.adaptive import adaptive_gradient, path_scale
from circuits.attribution.gradients import attribution_patching, integrated_gradients, site_total_effect
from circuits.behaviour import logit_difference
from circuits.edges import edge_effects
from circuits.nodes import aggregate_site, select_nodes
from circuits.passes import lanes_rows, max_rows
from circuits.prompts import PromptSet
from sae.autoencoder import SAEConfig, SparseAutoencoder
from sae.model import LanguageModel, Tokens

PAPER = {"attribution patching": 1.65, "IG, left Riemann 10": 84.1, "edges": 28.9, "circuit": 113.0}


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
    return LanguageModel.load(GPTNeoXForCausalLM(config).eval(), device=device)


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
        self.states = capture_states(self.model, self.saes, self.prompts, logit_difference, sites=self.sites)
        self.gradients = attribution_patching(self.model, self.states, logit_difference, sites=self.sites)
        self.nodes = select_nodes(self.aggregate(self.gradients), top=args.nodes)

    def aggregate(self, gradients) -> dict:
        nodes = {}
        for site in self.sites:
            s = self.states
            effects = contract_gradient(
                self.saes[site], s.clean[site], s.patch[site], gradients[site], mask=s.mask, zero_patch=s.zero_patch
            )
            nodes[site] = aggregate_site(
                effects, n_examples=len(self.prompts), n_positions=self.prompts.clean.n_positions, aggregation="sum"
            )
        return nodes

    def bare(self) -> None:
        """One forward and backward pass of the model itself, gradient at the embedding."""
        ids = self.prompts.clean.input_ids
        x = self.model.hf.get_input_embeddings()(ids).detach().requires_grad_()
        logits = self.model.hf(inputs_embeds=x, logits_to_keep=1, use_cache=False).logits
        torch.autograd.grad(logit_difference(logits[:, -1], self.prompts).sum(), x)

    def attrib(self) -> None:
        self.states = capture_states(self.model, self.saes, self.prompts, logit_difference, sites=self.sites)
        self.aggregate(attribution_patching(self.model, self.states, logit_difference, sites=self.sites))

    def ig(self, rule: str, steps: int) -> dict:
        self.states = capture_states(self.model, self.saes, self.prompts, logit_difference, sites=self.sites)
        gradients = {
            site: integrated_gradients(
                self.model, self.states, logit_difference, site=site, rule=rule, steps=steps, max_rows=self.rows
            )
            for site in self.sites
        }
        self.aggregate(gradients)
        return gradients

    def adaptive(self, residual: float) -> dict:
        self.states = capture_states(self.model, self.saes, self.prompts, logit_difference, sites=self.sites)
        at_clean = attribution_patching(self.model, self.states, logit_difference, sites=self.sites)
        gradients = {
            site: adaptive_gradient(
                self.model, self.states, logit_difference, site=site, at_clean=at_clean[site], residual=residual,
                scale=path_scale(self.states, {}), max_rows=self.rows,
            )[0]
            for site in self.sites
        }  # fmt: skip
        self.aggregate(gradients)
        return gradients

    def edges(self) -> None:
        rows = lanes_rows(self.rows, self.states.mask.shape[1], self.model.device)
        edge_effects(self.model, self.saes, self.states, logit_difference, self.gradients, self.nodes, max_rows=rows)

    def residual(self, gradients: dict) -> float:
        """Mean over sites of |sum of effects - measured| / |total effect|: the quadrature error."""
        total = (self.states.m_patch - self.states.m_clean).mean().abs()
        errors = []
        for site in self.sites:
            summed = ((self.states.patch[site] - self.states.clean[site]) * gradients[site]).sum((1, 2)).mean()
            measured = site_total_effect(self.model, self.states, logit_difference, site=site).mean()
            errors.append(((summed - measured).abs() / total).item())
        return statistics.mean(errors)


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, value in {"layers": 6, "width": 512, "features": 4096, "prompts": 32, "length": 8, "vocab": 5000}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--nodes", type=int, default=100, help="nodes between which edges are computed")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--memory", type=float, default=2.0, help="budget in GiB, as sfc discover --memory")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    bench = Bench(args)
    before = peak_mb(args.device)
    steps: dict[str, Callable] = {
        "bare forward + backward": bench.bare,
        "attribution patching": bench.attrib,
        "IG, left Riemann 10": lambda: bench.ig("left-riemann", 10),
        "IG, midpoint 10": lambda: bench.ig("midpoint", 10),
        "IG, midpoint 3": lambda: bench.ig("midpoint", 3),
        "IG, adaptive to .01": lambda: bench.adaptive(0.01),
        "edges": bench.edges,
    }
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(args.repeats):
        for name, function in steps.items():
            times[name].append(seconds(function, args.device))
    median = {name: statistics.median(values) for name, values in times.items()}
    median["circuit"] = median["IG, left Riemann 10"] + median["edges"]
    median["circuit, attribution"] = median["attribution patching"] + median["edges"]
    print(f"{'':26} {'seconds':>9} {'x bare':>8} {'paper s':>8} {'speed-up':>9}")
    for name, value in median.items():
        paper = PAPER.get(name)
        beside = f"{paper:8.2f} {paper / value:8.1f}x" if paper else ""
        print(f"{name:26} {value:9.3f} {value / median['bare forward + backward']:8.1f} {beside}")
    print(f"peak memory over model and SAEs: {peak_mb(args.device) - before:.0f} MB")
    for name in ("IG, left Riemann 10", "IG, midpoint 10", "IG, midpoint 3", "IG, adaptive to .01"):
        print(f"quadrature error, {name}: {bench.residual(steps[name]()):.5f} of the total effect")


if __name__ == "__main__":
    main()
