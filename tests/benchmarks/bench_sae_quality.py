"""Compares trained autoencoders with those of other packages at equal tokens, width and L0, on the same rows.

    python -m tests.benchmarks.bench_sae_quality --peer dictionary_learning=/venvs/dl/bin/python
        --peer sae_lens=/venvs/sl/bin/python --peer sparsify=/venvs/sp/bin/python
        [--data both|real|synthetic] [--only topk,batchtopk] [--rates 1,4] [--variant batchtopk:learning_rate=0.004]

1. Activations are made once (`quality_data`) and written to a file.
2. Everybody trains on it with the same number of features, tokens, tokens a step, and k: we with our defaults, peers
   with their own trainers and defaults in their own interpreters (`quality_peers`). `--rates` also gives peers
   multiples of their learning rates, `--variant` adds our own autoencoders with other options.
3. L0 is made equal. TopK has it by construction. BatchTopK and Matryoshka have one threshold, which is set, for all
   sides, where k features are active on training rows. Penalties: ours steers itself; a peer's coefficient is
   searched until L0 is within 5 % of k, in at most six trainings, and the nearest is taken. A peer that stays further
   than a fifth from our L0 is left out of the comparison and named.
4. All are read through `sae.formats` and scored by our metrics on held-out rows.

The last lines are ours minus the best peer for every architecture, metric by metric: means over the data sets. A
finished run stays in `--out` with its score, so a second call goes on where the first stopped.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from sae._files import read_json, write_json
from sae.autoencoder import SparseAutoencoder
from sae.data.activations import StreamState
from sae.formats import load_sae
from sae.model.sites import Site
from sae.training.config import TrainConfig
from sae.training.run_folder import RunFolder
from sae.training.trainer import Trainer
from sae.training.training_sae import TrainingSAE
from tests.benchmarks.quality_data import DIRECTIONS, Data, Real, Score, Synthetic, load_rows, rows_file

ARCHITECTURES = ("topk", "batchtopk", "jumprelu", "relu", "gated", "matryoshka")
PENALISED = ("jumprelu", "relu", "gated")
ONE_THRESHOLD = ("batchtopk", "matryoshka")
MAKES = {"dictionary_learning": ARCHITECTURES, "sae_lens": ARCHITECTURES, "sparsify": ("topk",)}
"""What each peer trains."""
FIRST_COEFFICIENT = {
    "dictionary_learning": {"relu": 0.05, "gated": 0.05},
    "sae_lens": {"relu": 5.0, "gated": 5.0, "jumprelu": 5.0},
}
"""Where the search for k active features begins; at k for dictionary_learning's JumpReLU, whose coefficient is L0."""
TRIES, NEAR, FAR = 6, 0.05, 0.2
CALIBRATION_ROWS = 2**15
SITES = ("resid_2", "mlp_2", "attn_2")

_COLUMNS = {
    "EV": "explained_variance",
    "CE rec": "ce_recovered",
    "mmcs": "mmcs",
    "over .9": "recovered",
    "dead": "dead",
}


@dataclass(frozen=True)
class Sizes:
    """What is equal for all."""

    features: int
    """Features of a dictionary."""
    k: int
    """Active features a token."""
    tokens: int
    """Rows trained on."""
    batch: int
    """Rows a step."""


@dataclass(frozen=True)
class Run:
    """One trained autoencoder and its score."""

    data: str
    """Data set."""
    architecture: str
    """Architecture."""
    maker: str
    """Who trained it, and with what changed."""
    coefficient: float | None
    """What steered its L0, where something had to be searched."""
    score: Score
    """Its score."""
    own_l0: float | None = None
    """L0 with the threshold that its trainer left, where another was set."""


class Rows:
    """Rows of a file as a trainer's activations."""

    def __init__(self, site: Site, x: Tensor):
        self.site, self.x, self.state = site, x, StreamState()
        self.widths = {site: x.shape[1]}

    def position(self) -> StreamState:
        return self.state

    def seek(self, state: StreamState) -> None:
        self.state = state

    def fill(self, buffer: dict[Site, Tensor]) -> int:
        x = buffer[self.site]
        rows = torch.arange(self.state.documents, self.state.documents + len(x)) % len(self.x)
        torch.index_select(self.x, 0, rows, out=x)
        self.state = StreamState(documents=self.state.documents + len(x))
        return len(x)


def train_ours(site: Site, x: Tensor, config: TrainConfig, out: Path) -> SparseAutoencoder:
    """Our own autoencoder on rows x [N, d]."""
    one = TrainingSAE(site.name, site, x.shape[1], config, torch.device("cpu"))
    Trainer([one], Rows(site, x), config, RunFolder(out, "train", {}), progress=False).run()
    sae = one.export()
    sae.save(out / "sae")
    return sae


class Peer:
    """Another package in its own interpreter, which trains one job after another."""

    FOLDERS: ClassVar = {"dictionary_learning": "trainer_0", "sae_lens": "", "sparsify": "run/site"}
    """Where each leaves its autoencoder."""

    def __init__(self, name: str, python: str):
        self.name, self.python = name, python
        self._process: subprocess.Popen[str] | None = None

    def train(self, job: dict[str, object], site: str, out: Path) -> SparseAutoencoder:
        """Its autoencoder, read from its own files."""
        folder = out / "sae"
        write_json(out / "job.json", job | {"peer": self.name, "out": str(folder)})
        if self._process is None:
            command = [self.python, str(Path(__file__).with_name("quality_peers.py"))]
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(f"{out / 'job.json'}\n")
        self._process.stdin.flush()
        if self._process.stdout.readline().strip() != "done":
            raise RuntimeError(f"{self.name} failed on {out}; what it said is above")
        return load_sae(folder / self.FOLDERS[self.name], site=site)


def with_mean_l0(sae: SparseAutoencoder, x: Tensor, k: int) -> SparseAutoencoder:
    """The autoencoder with one threshold for all features, with which k are active a token on rows x [N, d]."""
    free = SparseAutoencoder(sae.config, sae.state_dict() | {"threshold": torch.zeros_like(sae.threshold)})
    largest = torch.cat([free.encode(part).topk(min(8 * k, sae.config.n_features)).values for part in x.split(2**12)])
    threshold = largest.flatten().kthvalue(max(1, largest.numel() - k * len(x))).values
    return SparseAutoencoder(sae.config, sae.state_dict() | {"threshold": threshold.expand_as(sae.b_enc).clone()})


class Bench:
    """The runs of one data set."""

    def __init__(self, data: Data, sizes: Sizes, out: Path, *, threads: int):
        self.data, self.sizes, self.threads = data, sizes, threads
        self.out, self.path = out / data.name, rows_file(data, out / "rows")
        self.site = str(getattr(data, "site", "resid_0"))
        self._x: Tensor | None = None

    @property
    def x(self) -> Tensor:
        """The rows to train on, read when first needed."""
        if self._x is None:
            self._x = load_rows(self.path)
        return self._x

    def _cached(
        self, architecture: str, maker: str, coefficient: float | None, train: Callable[[Path], SparseAutoencoder]
    ) -> Run:
        """The run from its file, or trained, scored and written."""
        steered = "" if coefficient is None else f"-{coefficient:.4g}"
        s = self.sizes
        out = self.out / f"{architecture}-{maker}{steered}-F{s.features}-k{s.k}-{s.tokens}-{s.batch}".replace(" ", "_")
        path = out / "run.json"
        if path.is_file():
            entries = read_json(path)
            return Run(**entries | {"score": Score(**entries["score"])})
        sae, own = train(out), None
        if architecture in ONE_THRESHOLD:
            x = self.x[: CALIBRATION_ROWS // 4]
            own = len(sae.encode_sparse(x).token) / len(x)
            sae = with_mean_l0(sae, self.x[:CALIBRATION_ROWS], s.k)
        run = Run(self.data.name, architecture, maker, coefficient, self.data.score(sae), own)
        write_json(path, asdict(run))
        return run

    def ours(self, architecture: str, changes: dict[str, object], label: str) -> Run:
        """Ours, with our defaults but for the changes."""
        s = self.sizes
        config = TrainConfig(
            architecture=architecture, features=s.features, k=s.k, tokens=s.tokens, batch_size=s.batch, checkpoints=0
        )
        config = replace(config, **changes)
        maker = " ".join(["ours", *([label] if label else [])])
        return self._cached(
            architecture, maker, None, lambda out: train_ours(Site.parse(self.site), self.x, config, out)
        )

    def theirs(self, peer: Peer, architecture: str, rate: float) -> Run:
        """A peer's, at the L0 nearest to k."""
        s = self.sizes
        maker = peer.name if rate == 1 else f"{peer.name} rate x{rate:g}"

        def at(coefficient: float | None) -> Run:
            def train(out: Path) -> SparseAutoencoder:
                job = {
                    "architecture": architecture, "rows": str(self.path), "features": s.features, "k": s.k,
                    "batch": s.batch, "steps": s.tokens // s.batch, "seed": 0, "coefficient": coefficient,
                    "rate": rate, "threads": self.threads,
                }  # fmt: skip
                return peer.train(job, self.site, out)

            run = self._cached(architecture, maker, coefficient, train)
            told = f"coefficient {coefficient:.4g}, " if coefficient else ""
            print(f"{self.data.name} {architecture} {maker}: {told}L0 {run.score.l0:.1f}", file=sys.stderr)
            return run

        if architecture not in PENALISED:
            return at(None)
        first = FIRST_COEFFICIENT[peer.name].get(architecture, float(s.k))
        return search(at, first, s.k, rising=(peer.name, architecture) == ("dictionary_learning", "jumprelu"))


def search(at: Callable[[float], Run], first: float, k: int, *, rising: bool) -> Run:
    """The run with L0 nearest to k, by secants of log L0 over log coefficient; L0 rises with it or falls."""
    runs: list[Run] = []
    coefficient = float(f"{first:.4g}")
    while len(runs) < TRIES and coefficient not in [run.coefficient for run in runs]:
        runs.append(at(coefficient))
        if abs(runs[-1].score.l0 / k - 1) <= NEAR:
            break
        coefficient = float(f"{_next(runs, k, slope=1.0 if rising else -1.0):.4g}")
    return min(runs, key=lambda run: abs(math.log(max(run.score.l0, 1e-3) / k)))


def _next(runs: list[Run], k: int, *, slope: float) -> float:
    """The next coefficient: between the nearest on either side of k, else a step of at most a factor of 8."""
    points = sorted((math.log(max(r.score.l0, 1e-3) / k), math.log(r.coefficient or 1.0)) for r in runs)
    below, above = [p for p in points if p[0] < 0], [p for p in points if p[0] >= 0]
    if below and above:
        (y0, x0), (y1, x1) = below[-1], above[0]
        return math.exp(x0 - y0 * (x1 - x0) / (y1 - y0)) if y1 > y0 else math.exp((x0 + x1) / 2)
    y, x = min(points, key=lambda p: abs(p[0]))
    return math.exp(x + max(-2.0, min(2.0, -y / slope)))


def mean_scores(runs: list[Run]) -> dict[str, float]:
    """Means over data sets of what every run has."""
    columns = {f.name: [getattr(run.score, f.name) for run in runs] for f in fields(Score)}
    return {name: sum(c) / len(c) for name, c in columns.items() if all(v is not None for v in c)}


def table(runs: list[Run]) -> str:
    """All runs, a line each, and ours minus the best peer."""
    lines = [f"{'data':<12}{'architecture':<13}{'by':<32}{'L0':>6}{'own':>6}" + "".join(f"{n:>9}" for n in _COLUMNS)]
    for run in sorted(runs, key=lambda r: (r.data, ARCHITECTURES.index(r.architecture), r.maker)):
        own = f"{run.own_l0:6.1f}" if run.own_l0 is not None else " " * 6
        cells = "".join(_cell(getattr(run.score, name)) for name in _COLUMNS.values())
        lines.append(f"{run.data:<12}{run.architecture:<13}{run.maker:<32}{run.score.l0:6.1f}{own}{cells}")
    return "\n".join([*lines, "", *leads(runs)])


def _cell(value: float | None) -> str:
    return f"{value:9.4f}" if value is not None else f"{'':>9}"


def leads(runs: list[Run]) -> Iterator[str]:
    """For each kind of data and architecture, ours minus the best peer, by every metric; fewer dead is better."""
    yield f"{'ours - best peer, mean':<69}" + "".join(f"{n:>9}" for n in _COLUMNS)
    for kind in ("real", "synthetic"):
        of_kind = [run for run in runs if run.data.startswith("synthetic") == (kind == "synthetic")]
        for architecture in ARCHITECTURES:
            mine = [run for run in of_kind if run.architecture == architecture]
            far = _far_from_ours(mine)
            if far:
                yield f"{kind:<12}{architecture:<13}left out, L0 not reached: {', '.join(far)}"
            mine = [run for run in mine if run.maker not in far]
            by = {maker: mean_scores([r for r in mine if r.maker == maker]) for maker in {r.maker for r in mine}}
            peers = [score for maker, score in by.items() if not maker.startswith("ours")]
            if "ours" in by and peers:
                cells = "".join(_cell(_lead(by["ours"], peers, name)) for name in _COLUMNS.values())
                yield f"{kind:<12}{architecture:<57}{cells}"


def _far_from_ours(runs: list[Run]) -> list[str]:
    """Makers with an L0 more than a fifth away from ours on some data set."""
    ours = {run.data: run.score.l0 for run in runs if run.maker == "ours"}
    return sorted({run.maker for run in runs if run.data in ours and abs(run.score.l0 / ours[run.data] - 1) > FAR})


def _lead(ours: dict[str, float], peers: list[dict[str, float]], name: str) -> float | None:
    """Ours minus the best of the peers by one metric; None where it was not measured."""
    if name not in ours:
        return None
    best = min if name == "dead" else max
    return ours[name] - best(score[name] for score in peers)


def variants(texts: list[str]) -> dict[str, list[tuple[str, dict[str, object]]]]:
    """`architecture:option=value,option=value` by architecture, with the values as JSON where they are."""
    found: dict[str, list[tuple[str, dict[str, object]]]] = {}
    for text in texts:
        architecture, _, options = text.partition(":")
        pairs = (option.split("=") for option in options.split(","))
        found.setdefault(architecture, []).append((options, {name: _value(value) for name, value in pairs}))
    return found


def _value(text: str) -> object:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", action="append", default=[], help="NAME=PYTHON, the interpreter that has the package")
    parser.add_argument("--data", default="both", choices=("both", "real", "synthetic"))
    parser.add_argument("--only", default=",".join(ARCHITECTURES), help="architectures, separated by commas")
    parser.add_argument("--sites", default=",".join(SITES))
    parser.add_argument("--seeds", type=int, default=2, help="number of synthetic data sets")
    parser.add_argument("--rates", default="1", help="factors on the peers' learning rates")
    parser.add_argument("--variant", action="append", default=[], help="ARCHITECTURE:OPTION=VALUE,... of our own")
    parser.add_argument("--tokens", type=int, default=2**18)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--features", type=int, default=1024)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("runs/sae_quality"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    peers = [Peer(*text.split("=", 1)) for text in options.peer]
    sets: list[tuple[Data, Sizes]] = []
    if options.data != "synthetic":
        sizes = Sizes(options.features, 16, options.tokens, options.batch)
        sets += [(Real(site, options.tokens), sizes) for site in options.sites.split(",")]
    if options.data != "real":
        sizes = Sizes(DIRECTIONS, 12, options.tokens, options.batch)
        sets += [(Synthetic(seed, options.tokens), sizes) for seed in range(options.seeds)]
    extra, runs = variants(options.variant), []
    for architecture in options.only.split(","):
        for data, sizes in sets:
            bench = Bench(data, sizes, options.out.absolute(), threads=options.threads)
            runs.append(bench.ours(architecture, {}, ""))
            runs += [bench.ours(architecture, changes, label) for label, changes in extra.get(architecture, [])]
            for peer in (peer for peer in peers if architecture in MAKES[peer.name]):
                runs += [bench.theirs(peer, architecture, float(rate)) for rate in options.rates.split(",")]
    print(table(runs))
    write_json(options.out / "quality.json", [asdict(run) for run in runs])


if __name__ == "__main__":
    main()
