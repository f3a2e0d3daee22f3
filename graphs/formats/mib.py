"""A submission to the circuit track of MIB (Mueller et al. 2025; README of hannamw/MIB-circuit-track).

1. A submission is a folder with one folder a task and model, TASK_MODEL, as `ioi_gpt2` or `arc-easy_llama3`.
2. In each are nine circuits in the JSON of EAP-IG (`graphs.formats.eap_ig`), with at most .1, .2, .5, 1, 2, 5, 10, 20
   and 50 % of the model's edges. Membership is `in_graph`; `score`, which the benchmark's loader asks for, is 1 or 0.
3. A circuit of components is one of edges as well: the input and the k strongest components by |effect|, with all edges
   among them and to the logits. k is the largest number whose edges stay within the share. The input comes first: the
   benchmark leaves out what has no path from there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from graphs._files import write_json
from graphs._outputs import check_output, is_eap_ig
from graphs.errors import GraphError
from graphs.formats.eap_ig import EXTRA, INPUT, LOGITS, Pair, component_edges

SHARES = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50)
"""Per cent of all edges that the nine circuits have at most."""
TASKS = ("ioi", "mcqa", "arithmetic-addition", "arithmetic-subtraction", "arc-easy", "arc-challenge")
"""Tasks of the track."""
MODELS = {
    "gpt2": ("gpt2", "openai-community/gpt2"),
    "qwen2.5": ("Qwen/Qwen2.5-0.5B",),
    "gemma2": ("google/gemma-2-2b",),
    "llama3": ("meta-llama/Llama-3.1-8B",),
}
"""Models of the track -> what they are called on the hub."""


def write_mib(
    effects: Mapping[str, float], folder: str | Path, *, task: str, model: str, overwrite: bool = False, **shape: Any
) -> list[Path]:
    """Write the nine circuits of a task and model.

    Args:
        effects: Component (`input`, `a0.h0`, `m0`) -> effect, all components of the model.
        folder: The submission; the files go to TASK_MODEL in it.
        task: One of `TASKS`.
        model: One of `MODELS`.
        overwrite: Whether a file of these names that this program did not write is replaced.
        shape: n_layers, n_heads, d_model, and parallel, as for `to_eap_ig`.

    Returns:
        The files.

    Raises:
        GraphError: For a task or model that the track does not have, other components than the model's, or a file of
            another program.
    """
    check_column(task, model)
    circuits = to_mib(effects, **shape)
    paths = {share: Path(folder) / f"{task}_{model}" / f"edges_{share}.json" for share in circuits}
    for path in paths.values():
        check_output(path, is_eap_ig, overwrite=overwrite)
    for share, path in paths.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, circuits[share])
    return list(paths.values())


def check_column(task: str, model: str) -> None:
    """GraphError for a task or a model that the track does not have."""
    for what, name, names in (("task", task, TASKS), ("model", model, tuple(MODELS))):
        if name not in names:
            raise GraphError(f"{what} is {name!r}: MIB has {', '.join(names)}")


def to_mib(
    effects: Mapping[str, float], *, n_layers: int, n_heads: int, d_model: int, parallel: bool = False
) -> dict[float, dict[str, Any]]:
    """Share of the edges in per cent -> the circuit as EAP-IG's dictionary."""
    edges = component_edges(n_layers, n_heads, parallel=parallel)
    components = {source for (source, _) in edges}
    if components != {*effects}:
        strange = sorted({*effects} ^ components)[0]
        raise GraphError(f"component {strange!r}: effects are of other components than the model's {len(components)}")
    ranking = sorted(effects, key=lambda name: (name != INPUT, -abs(effects[name])))
    n_edges = sum(len(names) for names in edges.values())
    sizes = _sizes(edges, ranking)
    config = {"n_layers": n_layers, "n_heads": n_heads, "parallel_attn_mlp": parallel, "d_model": d_model}
    circuits = {}
    for share in SHARES:
        k = max(k for k, size in enumerate(sizes) if size <= share / 100 * n_edges)
        members = {*ranking[:k], LOGITS}
        chosen = {name for names in _among(edges, members).values() for name in names}
        circuits[share] = {
            "cfg": config,
            "nodes": {name: {"in_graph": name in members} for name in (*effects, LOGITS)},
            "edges": {
                name: {"score": float(name in chosen), "in_graph": name in chosen}
                for names in edges.values()
                for name in names
            },
            EXTRA: {"effects": dict(effects), "share": share},
        }
    return circuits


def _sizes(edges: Mapping[Pair, list[str]], ranking: Sequence[str]) -> list[int]:
    """The number of edges among the first k components, and from these to the logits, for k = 0, 1, ..."""
    from_k = {name: k for k, name in enumerate(ranking, start=1)}
    added: Counter[int] = Counter()
    for (source, target), names in edges.items():
        added[max(from_k[source], from_k.get(target, 0))] += len(names)
    return list(accumulate(added[k] for k in range(len(ranking) + 1)))


def _among(edges: Mapping[Pair, list[str]], members: Collection[str]) -> dict[Pair, list[str]]:
    """The edges among the components, and from these to the logits."""
    members = {*members, LOGITS}
    return {(source, target): names for (source, target), names in edges.items() if {source, target} <= members}
