"""Circuits of one task from two seeds beside those of two tasks: `python -m tests.benchmarks.bench_compare_circuits`.

On the bundled model: autoencoders of two seeds (`--saes RUN RUN`, or trained here into `--out` with the demo's
settings), and circuits of agreement across a prepositional phrase, agreement within a relative clause, and the gender
of a pronoun in the next sentence ("The king sleeps." He / She), whose prompts are made here. Two circuits of one task
should be the same mechanism, whatever the seed, and those of agreement and of gender different ones.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

from circuits import compare_circuits, discover, load_prompts
from circuits.prompts.dataset import PromptSet, make_prompts
from circuits.prompts.formats import Example
from examples.agreement import MODEL, prompts, text
from examples.agreement.grammar import NAMES, VERBS
from examples.agreement.lexicon import NOUNS
from sae import TrainConfig, load_model, load_saes, train_saes
from sae.model.language_model import LanguageModel

CONFIG = {"features": 256, "k": 8, "tokens": 400_000}
EXAMPLES = 100


def gender_prompts(model: LanguageModel) -> PromptSet:
    """Minimal pairs of a man and a woman, whom the next sentence calls he or she."""
    draw = random.Random(0)
    nouns = {gender: [noun.singular for noun in NOUNS if noun.gender == gender] for gender in "mf"}
    names = {gender: [name for name, of in NAMES if of == gender] for gender in "mf"}
    verbs = [verb.third for verb in VERBS["PERSON_ACTS"]]
    examples = []
    for number in range(EXAMPLES // 2):
        frame, words = ("The {} {}.", nouns) if number % 2 else ("{} {}.", names)
        verb, man, woman = draw.choice(verbs), draw.choice(words["m"]), draw.choice(words["f"])
        he, she = (frame.format(one, verb) for one in (man, woman))
        examples.append(Example(he, (" He",), she, (" She",), case="male"))
        examples.append(Example(she, (" She",), he, (" He",), case="female"))
    return make_prompts(examples, model)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--saes", nargs=2, help="run folders of autoencoders of two seeds; trained by default")
    parser.add_argument("--out", default="runs/two_seeds", help="folder of those that are trained, and of a page")
    asked = parser.parse_args()
    model, out = load_model(str(MODEL)), Path(asked.out)
    runs = [Path(run) for run in asked.saes or (out / "seed0", out / "seed1")]
    for seed, run in enumerate(runs):
        if not asked.saes:
            train_saes(model, text("train"), config=TrainConfig(**CONFIG, seed=seed), out=run)
    dictionaries = [load_saes(run) for run in runs]
    nounpp, within = (load_prompts(prompts(task, "train"), model, limit=EXAMPLES) for task in ("nounpp", "within_rc"))
    gender = gender_prompts(model)
    tasks = {"nounpp, 0": (0, nounpp), "nounpp, 1": (1, nounpp), "within_rc, 0": (0, within),
             "gender, 0": (0, gender), "gender, 1": (1, gender)}  # fmt: skip
    circuits = [discover(model, dictionaries[seed], pairs, edge_nodes=100) for seed, pairs in tasks.values()]
    comparison = compare_circuits(*circuits, names=list(tasks))
    print(comparison.text())
    out.mkdir(parents=True, exist_ok=True)
    print(f"wrote {comparison.pairs[0].picture(out / 'nounpp_two_seeds.html', overwrite=True)}")


if __name__ == "__main__":
    main()
