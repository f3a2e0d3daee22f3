"""What going through `LanguageModel` costs over bare torch hooks: `python -m tests.benchmarks.bench_model_access`.

A random GPT-2 of 6 layers, width 512; 8 prompts of 64 tokens; all 19 sites. Three operations, each done both ways on
the same weights in random turn, so that a slow moment of the machine hits both. Processor time on one thread, which
other processes disturb less than the clock on the wall; the ratio is of medians, and the aim is 1.05.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from sae.model.language_model import LanguageModel, Tokens
from sae.model.load import load_model

TARGET = 1.05


def build(width: int, layers: int) -> tuple[GPT2LMHeadModel, LanguageModel]:
    """The same random weights twice: bare, and behind `LanguageModel`."""

    def hf() -> GPT2LMHeadModel:
        torch.manual_seed(0)
        sizes = {"vocab_size": 1000, "n_embd": width, "n_layer": layers, "n_head": 8, "n_positions": 1024}
        config = GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)
        return GPT2LMHeadModel(config).eval().requires_grad_(False)

    return hf(), load_model(hf(), device="cpu")


@contextmanager
def hooks(hf: Any, paths: list[str], visit: Callable[[int, Tensor], Tensor | None]) -> Iterator[None]:
    """A forward hook at each path; what `visit` returns replaces the tensor."""

    def hook_at(index: int) -> Callable[..., Any]:
        def hook(module: Any, inputs: Any, output: Any) -> Any:
            new = visit(index, output[0] if isinstance(output, tuple) else output)
            if new is None:
                return None
            return (new, *output[1:]) if isinstance(output, tuple) else new

        return hook

    handles = [hf.get_submodule(path).register_forward_hook(hook_at(index)) for index, path in enumerate(paths)]
    yield
    for handle in handles:
        handle.remove()


def operations(hf: Any, model: LanguageModel, tokens: Tokens) -> dict[str, tuple[Callable[[], Any], Callable[[], Any]]]:
    """Name to (bare, ours)."""
    paths = [path.module for path in model.site_paths.values()]
    inputs = {
        "input_ids": tokens.input_ids,
        "attention_mask": tokens.attention_mask,
        "position_ids": tokens.position_ids,
        "use_cache": False,
    }

    def half(x: Tensor) -> Tensor:
        return x * 0.5

    def read_bare() -> Any:
        seen: list[Tensor] = []
        with torch.no_grad(), hooks(hf, paths, lambda i, x: seen.append(x)):
            return hf(**inputs).logits

    def write_bare() -> Any:
        with torch.no_grad(), hooks(hf, paths, lambda i, x: half(x)):
            return hf(**inputs).logits

    def gradients_bare() -> Any:
        seen: list[Tensor] = []

        def visit(index: int, x: Tensor) -> Tensor | None:
            seen.append(x if index else x.detach().requires_grad_(True))
            return None if index else seen[0]

        with hooks(hf, paths, visit):
            logits = hf(**inputs).logits
        return torch.autograd.grad(logits[:, -1, 0].sum(), seen)

    def read() -> Any:
        return model.run(tokens, capture=model.sites).logits

    def write() -> Any:
        return model.run(tokens, edits=dict.fromkeys(model.sites, half)).logits

    def gradients() -> Any:
        run = model.run(tokens, capture=model.sites, grad=True)
        return torch.autograd.grad(run.logits[:, -1, 0].sum(), list(run.activations.values()))

    return {
        "read all sites": (read_bare, read),
        "write all sites": (write_bare, write),
        "forward + backward to all sites": (gradients_bare, gradients),
    }


def times(pair: tuple[Callable[[], Any], Callable[[], Any]], repeats: int) -> tuple[list[float], list[float]]:
    """Processor seconds of each way, taken in random turns after one warm-up that also compares the results."""
    first, second = (function() for function in pair)
    torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-6)
    found: tuple[list[float], list[float]] = ([], [])
    for _ in range(repeats):
        for way in random.sample((0, 1), 2):
            start = time.process_time()
            pair[way]()
            found[way].append(time.process_time() - start)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--positions", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=20)
    options = parser.parse_args()
    torch.set_num_threads(1)
    random.seed(0)
    hf, model = build(options.width, options.layers)
    ids = torch.randint(1000, (options.prompts, options.positions))
    tokens = Tokens(ids, torch.ones_like(ids))
    size = f"{options.layers} layers, width {options.width}, {options.prompts} x {options.positions} tokens"
    print(f"GPT-2, {size}, {options.repeats} repeats")
    print(f"{'':34}{'hooks':>10}{'ours':>10}{'ratio':>8}   (aim {TARGET})")
    for name, pair in operations(hf, model, tokens).items():
        bare, ours = (statistics.median(seconds) for seconds in times(pair, options.repeats))
        print(f"{name:34}{bare * 1e3:8.1f}ms{ours * 1e3:8.1f}ms{ours / bare:8.3f}")


if __name__ == "__main__":
    main()
