"""The row of MIB's circuit leaderboard: CPR and CMD of a node method for every task and model, with heads and MLPs as
nodes, and the folder to submit.

`python -m tests.benchmarks.bench_mib --method ig-inputs --out runs/mib` on a machine with the hub and a GPU:

1. For every task and model of the leaderboard the pairs of the training split are read from the hub (`mib-bench/*`), as
   many as the benchmark's own script takes, and every head, every MLP and the input is scored
   (`circuits.benchmark.components`).
2. CPR and CMD are measured on `--split`, by the benchmark's rule, and printed beside the published ones of its node
   method (NAP-IG with counterfactuals; arXiv 2504.13151, public test split).
3. The nine circuits go to OUT/TASK_MODEL (`graphs.formats.mib`), and all numbers to OUT/row.json.

Answers of more than one token are left out here, where the benchmark takes their first token. Gemma 2 and Llama 3.1 ask
for an account of the hub that has accepted their licences; what cannot be loaded is said and left out.

`--tasks`, `--models` choose columns, `--place gpt2=FOLDER` says where a model is, `--data FOLDER` where FOLDER/TASK has
train.jsonl and test.jsonl in the benchmark's layout in place of the hub.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

from circuits.benchmark.components import component_effects, component_faithfulness
from circuits.prompts.dataset import load_prompts
from graphs.formats.mib import MODELS, TASKS, write_mib
from sae.errors import UserError
from sae.model.load import load_model

HUB = {
    "ioi": "mib-bench/ioi", "mcqa": "mib-bench/copycolors_mcqa:4_answer_choices",
    "arithmetic-addition": "mib-bench/arithmetic_addition",
    "arithmetic-subtraction": "mib-bench/arithmetic_subtraction",
    "arc-easy": "mib-bench/arc_easy", "arc-challenge": "mib-bench/arc_challenge",
}  # fmt: skip
"""Where the data set of a task is on the hub."""
COLUMNS = (
    *(("ioi", model) for model in MODELS), *(("mcqa", model) for model in ("qwen2.5", "gemma2", "llama3")),
    ("arithmetic-addition", "llama3"), ("arithmetic-subtraction", "llama3"), ("arc-easy", "gemma2"),
    ("arc-easy", "llama3"), ("arc-challenge", "llama3"),
)  # fmt: skip
"""Task and model of every column of the leaderboard, in its order."""
EXAMPLES = {"ioi": 1000, "mcqa": None}
"""Training pairs the benchmark's script takes; 100 of the tasks that are not named."""
PUBLISHED = {
    ("ioi", "gpt2"): 0.76, ("ioi", "qwen2.5"): 0.29, ("ioi", "gemma2"): 1.52, ("ioi", "llama3"): 0.42,
    ("mcqa", "qwen2.5"): 0.77, ("mcqa", "gemma2"): 1.71, ("mcqa", "llama3"): 1.87, ("arc-easy", "gemma2"): 1.53,
    ("arc-easy", "llama3"): 0.26, ("arc-challenge", "llama3"): 0.26,
}  # fmt: skip
"""CPR of NAP-IG with counterfactuals."""


def source(task: str, split: str, data: Path | None) -> str:
    """A split of a task, on the hub or below a folder."""
    return f"{HUB[task]}:{split}" if data is None else str(data / task / f"{split}.jsonl")


def column(task: str, name: str, args: argparse.Namespace) -> dict:
    """One column of the row: scores on the training split, curves on another, and the files to submit."""
    begin = time.perf_counter()
    places = dict(place.split("=", 1) for place in args.place)
    model = load_model(places.get(name, MODELS[name][0]), dtype=args.dtype)
    limit = args.examples or EXAMPLES.get(task, 100)
    train = load_prompts(source(task, "train", args.data), model, limit=limit)
    test = load_prompts(source(task, args.split, args.data), model, limit=args.test_examples)
    effects = component_effects(
        model, train, method=args.method, steps=args.steps, batch_size=args.batch_size, progress=not args.quiet
    )
    curve = component_faithfulness(model, test, effects, batch_size=args.batch_size, progress=not args.quiet)
    shape = {"n_layers": model.n_layers, "d_model": model.d_model, "parallel": model.parallel_blocks}
    shape["n_heads"] = sum(component.startswith("a0.") for component in effects)
    write_mib(effects, args.out, task=task, model=name, **shape)
    counts = {"train": len(train), "test": len(test), "rejected": test.rejected}
    return {**curve.to_dict(), **counts, "seconds": time.perf_counter() - begin}


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the submission")
    parser.add_argument("--method", default="ig-inputs", help="node method with a gradient, an ensemble, or exact")
    parser.add_argument("--steps", type=int, default=5, help="steps of ig and ig-inputs (5, as the benchmark's script)")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--models", nargs="+", choices=tuple(MODELS), default=list(MODELS))
    parser.add_argument("--split", default="test", choices=("validation", "test"))
    parser.add_argument("--examples", type=int, help="training pairs; what the benchmark's script takes by default")
    parser.add_argument("--test-examples", type=int, help="pairs to measure on; all by default")
    parser.add_argument("--data", type=Path, help="folder with TASK/train.jsonl and so on, in place of the hub")
    parser.add_argument("--place", nargs="+", default=[], metavar="MODEL=NAME", help="where a model is")
    parser.add_argument("--dtype", help="bfloat16 for large models; float32 by default")
    parser.add_argument("--batch-size", type=int, default=20)
    parser.add_argument("--quiet", action="store_true")
    args = parser.parse_args(words)
    rows = {}
    print(f"{'task and model':<30}{'CPR':>7}{'NAP-IG':>8}{'CMD':>7}{'pairs':>12}{'s':>7}", flush=True)
    for task, name in COLUMNS:
        if task not in args.tasks or name not in args.models:
            continue
        try:
            rows[f"{task}_{name}"] = row = column(task, name, args)
        except UserError as error:
            print(f"{task}_{name}: left out: {error}", flush=True)
            continue
        published = PUBLISHED.get((task, name))
        cells = [f"{row['cpr']:.2f}", "-" if published is None else f"{published:.2f}", f"{row['cmd']:.2f}"]
        pairs = f"{row['train']}, {row['test']}"
        print(
            f"{f'{task}_{name}':<30}{cells[0]:>7}{cells[1]:>8}{cells[2]:>7}{pairs:>12}{row['seconds']:>7.0f}",
            flush=True,
        )
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "row.json").write_text(json.dumps({"method": args.method, "split": args.split, "columns": rows}))
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
