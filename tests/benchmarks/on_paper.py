"""What training all sites of a model takes, on paper: `python -m tests.benchmarks.on_paper` prints the table of
`docs/scale.md`.

N tokens a step, n = N k active entries, F features, d width, S sites, P parameters beside the embeddings, G devices.
A step of one TopK autoencoder is the sum of what it does (rates as measured on an H200 by `tests.benchmarks.gpu`):

    encoder       2 N F d operations            at PRODUCTS
    selection     2 N F bytes                   at SELECTION
    kernels       4 d (3 n + 4 F + 3 N) bytes   at KERNELS      decoding, its gradients, the gradient of W_enc
    rows          4 d 5 F bytes                 at ROWS         projection and normalisation
    Adam          28 * 2 F d bytes              at ADAM
    launches      LAUNCHES of LAUNCH seconds                    small operations

The model takes 2 P N operations at FORWARD, an assumption (two fifths of the rate of large products). With `--parallel
sites` each of G devices trains ceil(S / G) sites on every step's N tokens, runs the model on N / G of them, and gets
4 d ceil(S / G) N (1 - 1/G) bytes of activations from the others at LINK. A device's memory is the model in bfloat16,
for each of its sites 16 * 2 F d bytes of weights, gradients and moments and 4 d B of the buffer of B tokens, and 6 N F
of one step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

PRODUCTS, FORWARD = 758e12, 300e12
SELECTION, KERNELS, ROWS, ADAM = 0.77e12, 2.9e12, 3.75e12, 3.5e12
LAUNCHES, LAUNCH = 100, 4e-6
LINK = {1: math.inf, 8: 300e9, 64: 40e9}
"""Bytes a second into a device, by their number: NVLink, and InfiniBand where there are several machines; assumed."""
BUFFER = 65_536
MEMORY = 141e9
"""Bytes of an H200."""


@dataclass(frozen=True)
class Plan:
    """Autoencoders at all sites of a model."""

    name: str
    width: int
    sites: int
    parameters: float
    features: int
    k: int = 64
    tokens: int = 4096

    def parts(self) -> dict[str, float]:
        """Seconds of one autoencoder's step, by what takes them."""
        n_entries, d, F, N = self.tokens * self.k, self.width, self.features, self.tokens
        return {
            "encoder": 2 * N * F * d / PRODUCTS,
            "selection": 2 * N * F / SELECTION,
            "kernels": 4 * d * (3 * n_entries + 4 * F + 3 * N) / KERNELS,
            "rows": 20 * d * F / ROWS,
            "Adam": 56 * F * d / ADAM,
            "launches": LAUNCHES * LAUNCH,
        }

    def devices(self, wanted: int) -> int:
        """At most one a site."""
        return min(wanted, self.sites)

    def seconds(self, wanted: int) -> dict[str, float]:
        """Seconds of a step of all sites on so many devices: in the model, between devices, in autoencoders."""
        devices = self.devices(wanted)
        mine = math.ceil(self.sites / devices)
        return {
            "model": 2 * self.parameters * self.tokens / devices / FORWARD,
            "link": 4 * self.width * mine * self.tokens * (1 - 1 / devices) / LINK[wanted],
            "autoencoders": mine * sum(self.parts().values()),
        }

    def memory(self, wanted: int) -> float:
        """Bytes of a device."""
        mine = math.ceil(self.sites / self.devices(wanted))
        per_site = 32 * self.features * self.width + 4 * self.width * BUFFER
        return 2 * self.parameters + mine * per_site + 6 * self.tokens * self.features


PLANS = (
    Plan("Pythia-70M", width=512, sites=19, parameters=19e6, features=32_768),
    Plan("Gemma 2 2B", width=2304, sites=79, parameters=2.0e9, features=16_384),
    Plan("Gemma 2 27B", width=4608, sites=139, parameters=26e9, features=131_072),
)


def row(plan: Plan, wanted: int) -> str:
    """A line of the table."""
    seconds, memory, n = plan.seconds(wanted), plan.memory(wanted), plan.devices(wanted)
    rate = plan.tokens / sum(seconds.values())
    mine = math.ceil(plan.sites / n)
    parts = {name: mine * value for name, value in plan.parts().items()}
    parts |= {name: seconds[name] for name in ("model", "link")}
    most = max(parts, key=lambda name: parts[name])
    fits = "" if memory < MEMORY else ": too many"
    return (
        f"| {plan.name} | {plan.sites}, {plan.features:,} | {n} | {rate:,.0f} | {1e9 / rate / 3600:,.1f} "
        f"| {memory / 1e9:.0f}{fits} | {most}, {parts[most] / sum(seconds.values()):.0%} |"
    )


def table() -> list[str]:
    """The lines of the table of all plans."""
    names = "model", "sites, features", "devices", "tokens/s", "hours for 1e9 tokens", "GB a device", "most of the time"
    return [f"| {' | '.join(names)} |", "|---" * len(names) + "|", *(row(plan, n) for plan in PLANS for n in LINK)]


def main() -> None:
    print("\n".join(table()))
    known = Plan("", width=2304, sites=1, parameters=0, features=65_536)
    print(f"\nthe step that was measured, 8.9 ms: {1e3 * sum(known.parts().values()):.1f} ms on paper")
    print(", ".join(f"{name} {1e3 * value:.2f}" for name, value in known.parts().items()))


if __name__ == "__main__":
    main()
