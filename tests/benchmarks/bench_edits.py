"""Edits that are chosen beside those of the strongest features: `python -m tests.benchmarks.bench_edits --saes RUN`.

On held-out prompts and text, for each task of the bundled model (with the autoencoders of a demo, `--saes runs/demo`)
or for circuits that are there already (`--circuit RUN --prompts TEST.jsonl --text TEXT`): what is left of the |logit
difference| balanced over cases, and the cost in nats a token at the behaviour's tokens and elsewhere. The aim is at
most 15 % left at a third of the cost elsewhere of zeroing the ten strongest. `--steer` alone: the edit that `sfc steer
--choose flip` takes, and the share of pairs whose other answer is ahead, in all and by case (aim: .9).
"""

from __future__ import annotations

import argparse
import time
from itertools import islice
from pathlib import Path

from circuits.circuit import Circuit
from circuits.discovery.discover import discover
from circuits.editing.declaration import Edit
from circuits.editing.edit import EditOptions, prepare_trial
from circuits.editing.flipping import choose_flipping
from circuits.editing.measures import answers_of
from circuits.editing.results import EditReport
from circuits.editing.surgical import choose_surgical
from circuits.options import DiscoverOptions
from circuits.prompts.dataset import PromptSet, load_prompts
from sae.data.text import TextSource
from sae.model.load import load_model
from sae.saes import load_saes

AGREEMENT = Path("examples/agreement")
TASKS = ("simple", "nounpp", "rc", "within_rc")


def line(name: str, report: EditReport) -> str:
    """One row of the table."""
    before, after = report.before, report.after
    names = ("ce_behaviour", "ce_elsewhere")
    costs = [(getattr(after, name) or 0.0) - (getattr(before, name) or 0.0) for name in names]
    by_case = " ".join(f"{100 * left:.0f}" for left in report.remaining_by_case.values() if left is not None)
    lean = "" if report.bias is None else f"{report.bias.after:+.2f}"
    left = f"{len(report.features):3} {100 * (report.remaining or 0):5.1f} %"
    numbers = f"{left} {costs[0]:+.3f} {costs[1]:+.4f} {after.kl:.3f}"
    return f"  {name:<20}{numbers}  {lean:>6}  {by_case}"


def compare(name: str, circuit: Circuit, train: str, held_out: PromptSet, text: str, *, penalty: float) -> None:
    """Choose on training prompts and text, and print every edit on the others."""
    texts = list(islice(TextSource.of(text).read(), 300))
    answers = answers_of(circuit.read_prompts(train))
    edit, choice = choose_surgical(circuit, texts=texts[200:], penalty=penalty, answers=answers)
    strongest = list(circuit.strongest_features(10))
    options = EditOptions(texts=texts[:200], n_random=0, answers=answers, resamples=0)
    print(f"\n{name}: {len(held_out)} prompts; {choice.n_trials} trials in {choice.seconds:.0f} s")
    print("  edit                  n    left   CE own  elsewhere KL     bias  by case, %", flush=True)
    edits = {"surgical": edit, "ten strongest, zero": Edit(strongest).everywhere()}
    edits["ten strongest, mean"] = Edit(strongest, "mean").everywhere()
    for title, one in edits.items():
        trial = prepare_trial(circuit.model, circuit.saes, one, held_out, options, metric=circuit.metric)
        print(line(title, trial.report()), flush=True)


def compare_flips(name: str, circuit: Circuit, train: str, held_out: PromptSet, text: str) -> None:
    """Choose an edit that flips answers on training prompts and text, and print what it does on the others."""
    texts = list(islice(TextSource.of(text).read(), 300))
    answers = answers_of(circuit.read_prompts(train))
    begin = time.perf_counter()
    edit = choose_flipping(circuit, texts=texts[200:], answers=answers)
    seconds = time.perf_counter() - begin
    options = EditOptions(texts=texts[:200], n_random=3, answers=answers, resamples=0)
    report = prepare_trial(circuit.model, circuit.saes, edit, held_out, options, metric=circuit.metric).report()
    by_case = " ".join(f"{100 * (1 - (score.accuracy or 0)):.0f}" for score in report.after.by_case.values())
    drawn = max((1 - (run.overall.accuracy or 0) for run in report.random), default=0.0)
    print(f"{name:<10} {', '.join(edit.names):<40} x {edit.strength:g}: flipped {100 * (report.flipped or 0):.1f} % "
          f"({by_case}), elsewhere {report.cost_elsewhere or 0:+.4f}, KL {report.after.kl:.3f}; random at most "
          f"{100 * drawn:.1f} %; {seconds:.0f} s", flush=True)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--saes", help="run folder of a demo")
    parser.add_argument("--circuit", nargs="*", default=(), help="run folders with circuits")
    parser.add_argument("--prompts", help="held-out prompts of --circuit")
    parser.add_argument("--text", default=str(AGREEMENT / "text" / "valid.txt"))
    parser.add_argument("--penalty", type=float, default=3.0)
    parser.add_argument("--steer", action="store_true", help="edits that flip the answer, in place of chosen ablations")
    options = parser.parse_args()
    for run in options.circuit:
        circuit = Circuit.load(run)
        held_out = circuit.read_prompts(options.prompts)
        if options.steer:
            compare_flips(run, circuit, circuit.metadata["prompts"], held_out, options.text)
        else:
            compare(run, circuit, circuit.metadata["prompts"], held_out, options.text, penalty=options.penalty)
    if options.saes:
        model, saes = load_model(str(AGREEMENT / "model")), load_saes(options.saes)
        for task in TASKS:
            folder = AGREEMENT / "prompts" / task
            train = load_prompts(folder / "train.jsonl", model, limit=100)
            test = load_prompts(folder / "test.jsonl", model)
            found = discover(model, saes, train, DiscoverOptions(edge_nodes=0), progress=False)
            if options.steer:
                compare_flips(task, found, str(folder / "train.jsonl"), test, options.text)
            else:
                compare(task, found, str(folder / "train.jsonl"), test, options.text, penalty=options.penalty)


if __name__ == "__main__":
    main()
