"""Records what dictionary_learning itself computes, in the environment it is installed in.

    pip install dictionary-learning==0.1.0
    python tests/sae/recorded/record_dictionary_learning.py

For each of its classes a folder with `ae.pt` and `config.json` as its training writes them, small and random with a
decoder that is not normalised, and `expected.safetensors`: inputs x, features f and reconstruction x_hat of the
dictionary that its own `load_dictionary` reads there, and the norms of that dictionary's decoder rows.
"""

import json
import sys
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

import torch
from safetensors.torch import save_file

D, F, K, N = 16, 48, 5, 24
HERE = Path(__file__).parent / "dictionary_learning"
CLASSES = {
    "AutoEncoder": (D, F),
    "AutoEncoderNew": (D, F),
    "GatedAutoEncoder": (D, F),
    "AutoEncoderTopK": (D, F, K),
    "BatchTopKSAE": (D, F, K),
    "BatchTopKSAE_unset": (D, F, K),
    "MatryoshkaBatchTopKSAE": (D, F, K, [8, 16, 24]),
    "JumpReluAutoEncoder": (D, F),
}
"""The arguments of each class, by the name of its folder."""


def without_nnsight():
    """The package imports an old nnsight, which its dictionaries do not use and which fails beside transformers 5."""
    sys.modules["nnsight"] = ModuleType("nnsight")
    sys.modules["nnsight"].LanguageModel = object


@torch.no_grad()
def randomise(dictionary, generator, *, threshold):
    for name, tensor in dictionary.named_parameters():
        size = 0.3 if tensor.dim() > 1 else 0.4
        tensor.copy_(size * torch.randn(tensor.shape, generator=generator))
        if name == "threshold":
            tensor.abs_()
    for name, tensor in dictionary.named_buffers():
        if name == "threshold":
            tensor.fill_(threshold)


@torch.no_grad()
def main():
    without_nnsight()
    utils = import_module("dictionary_learning.utils")
    for seed, (name, arguments) in enumerate(CLASSES.items()):
        dictionary = getattr(utils, name.removesuffix("_unset"))(*arguments)
        generator = torch.Generator().manual_seed(seed)
        randomise(dictionary, generator, threshold=-1.0 if name.endswith("unset") else 0.6)
        folder = HERE / name
        folder.mkdir(parents=True, exist_ok=True)
        torch.save({key: value.cpu() for key, value in dictionary.state_dict().items()}, folder / "ae.pt")
        trainer = {"dict_class": type(dictionary).__name__, "activation_dim": D, "dict_size": F, "k": K, "layer": 3}
        trainer |= {"lm_name": "EleutherAI/pythia-70m-deduped", "submodule_name": "resid_post_layer_3"}
        (folder / "config.json").write_text(json.dumps({"trainer": trainer, "buffer": {}}, indent=1) + "\n")

        loaded, _ = utils.load_dictionary(str(folder), "cpu")
        x = torch.randn(N, D, generator=generator) + 0.5
        decoder = loaded.W_dec if hasattr(loaded, "W_dec") else loaded.decoder.weight.T
        expected = {"x": x, "f": loaded.encode(x), "x_hat": loaded(x), "norms": decoder.norm(dim=-1)}
        save_file({key: value.contiguous() for key, value in expected.items()}, folder / "expected.safetensors")
    versions = {package: version(package) for package in ("dictionary-learning", "torch")}
    (HERE / "versions.json").write_text(json.dumps(versions, indent=1) + "\n")


if __name__ == "__main__":
    main()
