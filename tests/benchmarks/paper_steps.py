"""Steps of the paper's own code (github.com/saprmarks/feature-circuits), run on request where it is installed.

`bench_circuit` starts this file with the python of that code's environment, in its checkout, and talks to it in lines
of JSON: first what is given (a folder of files, threads, how many nodes), then the name of a step for its seconds. It
imports torch, that code and what that code imports, nothing of ours; nothing of that code is here. What is called:

- "attribution patching": `attribution.patching_effect` with its method "attrib";
- "circuit": `circuit.get_circuit`, with the node threshold that keeps as many nodes as are asked for. The seconds that
  its call of `patching_effect` takes are those of integrated gradients, the rest are those of the edges.

The metric reads the logits from the unembedding, where the interpolated runs of that code's integrated gradients reach
it; so both sides compute the same numbers, which are written to a file for comparison.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

import torch
from safetensors.torch import load_file, save_file

NODE_EFFECTS = "paper_effects.safetensors"


class PaperCode:
    """The model, dictionaries and prompts of a folder, in the classes of the paper's code."""

    def __init__(self, folder: Path, nodes: int, device: str) -> None:
        import attribution
        import circuit
        from loading_utils import Submodule

        facts = json.loads((folder / "facts.json").read_text())
        self.attribution, self.circuit_module, self.n_nodes = attribution, circuit, nodes
        self.device = device
        self.model, self.head = load_model(facts["model"], load_file(folder / "model.safetensors"), device)
        prompts = load_file(folder / "prompts.safetensors", device=device)
        self.clean, self.patch, self.answers = prompts["clean"], prompts["patch"], prompts["answers"]
        tensors, self.dictionaries = load_file(folder / "saes.safetensors", device=device), {}
        inner, modules = self.model.gpt_neox, {}
        modules["embed"] = Submodule(name="embed", submodule=inner.embed_in)
        for i in range(facts["model"]["num_hidden_layers"]):
            layer = inner.layers[i]
            modules[f"attn_{i}"] = Submodule(name=f"attn_{i}", submodule=layer.attention, is_tuple=True)
            modules[f"mlp_{i}"] = Submodule(name=f"mlp_{i}", submodule=layer.mlp)
            modules[f"resid_{i}"] = Submodule(name=f"resid_{i}", submodule=layer, is_tuple=True)
        self.modules: dict[str, Any] = modules
        for name, module in modules.items():
            self.dictionaries[module] = load_dictionary(tensors, name)
        self.threshold: float | None = None

    def metric(self, model: Any) -> torch.Tensor:
        """logit(patch answer) - logit(clean answer) at the last position, [B]."""
        logits = getattr(model, self.head).output[:, -1]
        values = torch.gather(logits, 1, self.answers)  # [B, 2]
        return values[:, 1] - values[:, 0]

    def effects(self, method: str) -> Any:
        return self.attribution.patching_effect(
            self.clean, self.patch, self.model, list(self.modules.values()), self.dictionaries, self.metric,
            method=method,
        )  # fmt: skip

    def clock(self) -> float:
        """Seconds, once the device has done all that was asked of it."""
        if self.device.startswith("cuda"):
            torch.cuda.synchronize()
        return time.perf_counter()

    def attribution_patching(self) -> dict[str, float]:
        started = self.clock()
        self.effects("attrib")
        return {"attribution patching": self.clock() - started}

    def circuit(self) -> dict[str, float]:
        """Seconds of the whole, of its integrated gradients and of its edges."""
        nodes, patching_effect = [], self.circuit_module.patching_effect

        def timed(*args: Any, **options: Any) -> Any:
            started = self.clock()
            out = patching_effect(*args, **options)
            nodes.append(self.clock() - started)
            return out

        if self.threshold is None:
            self.threshold = self._threshold()
        kinds = {
            kind: [module for name, module in self.modules.items() if name.startswith(kind)]
            for kind in ("attn", "mlp", "resid")
        }
        self.circuit_module.patching_effect = timed
        started = self.clock()
        self.circuit_module.get_circuit(
            self.clean, self.patch, self.model, self.modules["embed"], kinds["attn"], kinds["mlp"], kinds["resid"],
            self.dictionaries, self.metric, parallel_attn=True, node_threshold=self.threshold,
        )  # fmt: skip
        seconds = self.clock() - started
        self.circuit_module.patching_effect = patching_effect
        return {"circuit": seconds, "integrated gradients": sum(nodes), "edges": seconds - sum(nodes)}

    def _threshold(self) -> float:
        """The effect that as many nodes exceed as are asked for."""
        effects = self.effects("ig").effects
        sizes = torch.cat([effect.to_tensor().detach().abs().flatten() for effect in effects.values()])
        return float(sizes.topk(self.n_nodes + 1).values[-1])

    def write_effects(self, folder: Path) -> dict[str, float]:
        """Integrated gradients of every feature and error, [B, S, F + 1] a site."""
        effects = self.effects("ig").effects
        tensors = {module.name: effect.to_tensor().detach().cpu().contiguous() for module, effect in effects.items()}
        save_file(tensors, folder / NODE_EFFECTS)
        return {}


def load_model(facts: dict[str, Any], weights: dict[str, torch.Tensor], device: str) -> tuple[Any, str]:
    """A GPT-NeoX in nnsight's wrapper, with a tokenizer that only has to pad rows that are equally long; and what its
    unembedding is called there (`lm_head` in later transformers)."""
    from nnsight import LanguageModel
    from tokenizers import Tokenizer, models
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast

    hf = GPTNeoXForCausalLM(GPTNeoXConfig(**facts)).eval()
    head = "embed_out" if hasattr(hf, "embed_out") else "lm_head"
    hf.load_state_dict({name.replace("embed_out.", f"{head}."): tensor for name, tensor in weights.items()})
    words = Tokenizer(models.WordLevel({str(i): i for i in range(facts["vocab_size"])}, unk_token="0"))
    hf.to(device)
    return LanguageModel(hf, tokenizer=PreTrainedTokenizerFast(tokenizer_object=words, pad_token="0")), head


def load_dictionary(tensors: dict[str, torch.Tensor], name: str) -> Any:
    """f = relu(W_enc (x - b) + b_enc), where ours has no -b."""
    from dictionary_learning import AutoEncoder

    W_enc, b_enc, W_dec, b_dec = (tensors[f"{name}.{key}"] for key in ("W_enc", "b_enc", "W_dec", "b_dec"))
    dictionary = AutoEncoder(W_enc.shape[1], W_enc.shape[0])
    dictionary.load_state_dict(
        {"bias": b_dec, "encoder.weight": W_enc, "encoder.bias": b_enc + W_enc @ b_dec, "decoder.weight": W_dec.T}
    )
    return dictionary.to(W_enc.device)


def serve(lines: TextIO, answers: TextIO) -> None:
    """Answers each line with one; the first says what is given."""

    def answer(value: Any) -> None:
        answers.write(json.dumps(value) + "\n")
        answers.flush()

    given = json.loads(lines.readline())
    torch.set_num_threads(given["threads"])
    folder = Path(given["folder"])
    code = PaperCode(folder, given["nodes"], given["device"])
    steps: dict[str, Callable[[], dict[str, float]]] = {
        "attribution patching": code.attribution_patching,
        "circuit": code.circuit,
        "effects": lambda: code.write_effects(folder),
    }
    answer({"torch": torch.__version__})
    for line in lines:
        answer(steps[json.loads(line)]())


if __name__ == "__main__":
    sys.path.insert(0, "")  # the checkout
    answers, sys.stdout = sys.stdout, sys.stderr  # what the code prints is no answer
    serve(sys.stdin, answers)
