"""What edits cost in generation: `python -m tests.benchmarks.bench_edited_generation`.

The random GPT-2 of `bench_model_access` (6 layers, width 512), random autoencoders of 4096 features, ten features
edited at three sites. Tokens are generated with and without edits in random turn, with a KV cache; processor time on
one thread, and the median of the ratios of turns. The aim is 1.2.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable

import torch

from circuits.editing.applied import edited
from circuits.editing.declaration import Edit
from sae.autoencoder import SAEConfig, SparseAutoencoder
from sae.model.sites import Site
from sae.model.tokens import Tokens
from sae.saes import SAEs
from tests.benchmarks.bench_model_access import build

TARGET = 1.2
SITES = [Site("resid", 1), Site("mlp", 3), Site("resid", 4)]
FEATURES = 4096


def random_saes(width: int, architecture: str) -> SAEs:
    """Autoencoders with unit decoder rows; about one feature in 64 is active."""

    def one(site: Site, seed: int) -> SparseAutoencoder:
        generator = torch.Generator().manual_seed(seed)
        W_dec = torch.nn.functional.normalize(torch.randn(FEATURES, width, generator=generator), dim=-1)
        zeros = torch.zeros(FEATURES)
        tensors = {"W_enc": W_dec, "b_enc": zeros, "W_dec": W_dec, "b_dec": torch.zeros(width)}
        if architecture == "jumprelu":
            tensors["threshold"] = zeros + 0.5
        k = 64 if architecture == "topk" else None
        config = SAEConfig(architecture=architecture, d_model=width, n_features=FEATURES, site=str(site), k=k)
        return SparseAutoencoder(config, tensors)

    return SAEs({site: one(site, seed) for seed, site in enumerate(SITES)})


def seconds(action: Callable[[], object]) -> float:
    """Processor time."""
    begin = time.process_time()
    action()
    return time.process_time() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--tokens", type=int, default=24, help="generated tokens")
    options = parser.parse_args()
    torch.set_num_threads(1)
    _, model = build(512, 6)
    names = [f"{site}/{7 * n}" for n in range(10) for site in SITES[n % 3 : n % 3 + 1]]
    print(f"ten features at {', '.join(map(str, SITES))}; aim {TARGET}")
    for rows in (1, 8):
        ids = torch.randint(1000, (rows, 16), generator=torch.Generator().manual_seed(0))
        prompts = Tokens(ids, torch.ones_like(ids))
        for architecture in ("jumprelu", "topk"):
            saes = random_saes(512, architecture)
            for operation, value in (("steer", 4.0), ("scale", 2.0), ("mean", None)):
                edit = Edit(names, operation, value, reference=dict.fromkeys(names, 0.3))

                def plain(prompts=prompts) -> None:
                    model.generate(prompts, max_new_tokens=options.tokens, eos_token_id=None)

                def with_edits(edit=edit, saes=saes, plain=plain) -> None:
                    with edited(model, saes, edit):
                        plain()

                plain(), with_edits()
                times: dict[Callable[[], None], list[float]] = {plain: [], with_edits: []}
                for _ in range(options.repeats):
                    for action in random.sample(list(times), 2):
                        times[action].append(seconds(action))
                per_token = 1000 * statistics.median(times[plain]) / options.tokens
                ratio = statistics.median(b / a for a, b in zip(times[plain], times[with_edits], strict=True))
                setting = f"{rows} rows  {architecture:<9}{operation:<6}"
                print(f"{setting} {per_token:6.2f} ms a token  x{ratio:.3f}", flush=True)


if __name__ == "__main__":
    main()
