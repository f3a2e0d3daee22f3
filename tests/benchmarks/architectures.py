"""Which decoders work, and how far: tiny random models of some 130 families, or of those named, tried one by one.

    python -m tests.benchmarks.architectures > tests/benchmarks/architectures.md
    python -m tests.benchmarks.architectures opt falcon

1. Sites: `all` where every block has attn and mlp (or its one sublayer) and they add up to the residual stream; else
   `embed, resid` or the sentence with which the model is refused.
2. Padding: `none shows`, or `equal lengths` where a recurrent state runs over it.
3. IG: the largest completeness error of integrated gradients (50 midpoints) over the sites, by the largest effect.
4. relp: `conserved` where the relevance of inputs and biases adds up, else `refused`. GradDrop: `runs` or `refused`.
5. Generation: `greedy, edited` where an edit of every site's output agrees with the same edit step by step.
"""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Callable

import torch
from transformers import AutoModelForCausalLM

from circuits.attribution.node_effects import METHODS
from circuits.discovery.discover import discover
from circuits.options import DiscoverOptions
from circuits.prompts.dataset import PromptSet, make_prompts
from circuits.prompts.formats import Example
from sae.errors import UserError
from sae.model.language_model import LanguageModel
from sae.model.load import load_model
from sae.model.lrp import check_conserved
from sae.model.tokens import Tokens
from sae.neurons import neuron_dictionaries
from tests.conftest import word_tokenizer
from tests.tiny_models import FAMILIES, MORE_FAMILIES, tiny_config, tiny_model

EXAMPLES = [
    Example("the man near the dogs", (" runs",), "the men near the dogs", (" run",)),
    Example("the boy near the cats", (" sings",), "the boys near the cats", (" sing",)),
]
COLUMNS = ("family", "sites", "padding", "IG error", "relp", "GradDrop", "generation")
NEW_TOKENS = 3
MOST_PARAMETERS = 2_000_000


def main(families: list[str]) -> None:
    """Print a Markdown table of the families."""
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}")
    skipped = []
    for family in families or sorted(FAMILIES + MORE_FAMILIES):
        try:
            if n_parameters(family) > MOST_PARAMETERS:
                raise ValueError("its sizes stand elsewhere in its config")
            hf = tiny_model(family)
        except Exception:
            skipped.append(family)
            continue
        print(f"| {' | '.join([family, *row(hf)])} |", flush=True)
    if skipped:
        print(f"\nNot tried, for their configs need more than small sizes: {', '.join(skipped)}.")


def n_parameters(family: str) -> int:
    """Of its tiny model, whose config may hold sizes that are not known here."""
    with torch.device("meta"):
        return sum(x.numel() for x in AutoModelForCausalLM.from_config(tiny_config(family)).parameters())


def row(hf: torch.nn.Module) -> list[str]:
    """The cells of one model after its name."""
    try:
        model = load_model(hf, tokenizer=word_tokenizer(), device="cpu")
    except UserError as error:
        return [f"refused: {str(error).split(':')[0]}", *[""] * (len(COLUMNS) - 2)]
    prompts = make_prompts(EXAMPLES, model)
    return [
        sites(model),
        "equal lengths" if model.padding_shows else "none shows",
        tried(lambda: f"{completeness(model, prompts):.3f}"),
        tried(lambda: check_conserved(model) or "conserved"),
        tried(lambda: "runs" if run_method(model, prompts, "graddrop") else ""),
        tried(lambda: generation(model)),
    ]


def tried(check: Callable[[], str]) -> str:
    """What a check says; `refused` for a sentence, the exception's class for anything else."""
    try:
        return check()
    except UserError:
        return "refused"
    except Exception as error:
        return type(error).__name__


def sites(model: LanguageModel) -> str:
    """Which kinds of sites every block has."""
    found = [{site.kind for site in model.sites if site.layer == layer} - {"resid"} for layer in range(model.n_layers)]
    if not all(found):
        return "embed, resid" if not any(found) else f"all but {sum(not kinds for kinds in found)} blocks' sublayers"
    places = model._hook_points.values()
    notes = {
        "scaled": any(place.scale != 1 for place in places),
        "flat": any(place.flat for place in places),
        "in place": any(place.in_place for place in places),
    }
    shown = ", ".join(name for name, there in notes.items() if there)
    return f"all ({shown})" if shown else "all"


def run_method(model: LanguageModel, prompts: PromptSet, method: str) -> dict:
    """The metadata of a circuit of neurons found by a method."""
    assert method in METHODS
    options = DiscoverOptions(method=method, steps=50, edge_nodes=0)
    return discover(model, neuron_dictionaries(model), prompts, options, progress=False).metadata


def completeness(model: LanguageModel, prompts: PromptSet) -> float:
    """Largest completeness error of integrated gradients."""
    return float(run_method(model, prompts, "ig")["completeness"]["worst_residual"])


def generation(model: LanguageModel) -> str:
    """Whether an edit at every step is the same edit of the text so far."""
    tokens = model.tokenize(["the man near the old dogs"])
    edits = {model.sites[-1]: lambda x: x + torch.linspace(-1, 1, x.shape[-1])}
    ids = model.generate(tokens, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, edits=edits)
    for step in range(NEW_TOKENS):
        so_far = ids[:, : tokens.n_positions + step]
        logits = model.run(Tokens(so_far, torch.ones_like(so_far)), edits=edits).logits[0, -1]
        logits[model.tokenizer.eos_token_id] = -torch.inf
        if logits.argmax() != ids[0, so_far.shape[1]]:
            return f"differs at step {step}"
    return "greedy, edited"


if __name__ == "__main__":
    main(sys.argv[1:])
