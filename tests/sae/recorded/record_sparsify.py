"""Records what sparsify itself computes, in the environment it is installed in.

    pip install eai-sparsify==1.3.0
    python tests/sae/recorded/record_sparsify.py

Folders named by modules, with `cfg.json` and `sae.safetensors` written by `SparseCoder.save_to_disk`, and
`expected.safetensors`: inputs x, dense features f and reconstruction x_hat of the coder that `load_from_disk` reads.
"""

import json
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors.torch import save_file
from sparsify import SparseCoder
from sparsify.config import SparseCoderConfig

D, F, K, N = 16, 48, 5, 24
HERE = Path(__file__).parent / "sparsify"
CODERS = {
    "layers.3": SparseCoderConfig(num_latents=F, k=K),
    "layers.3.mlp": SparseCoderConfig(expansion_factor=3, k=K, normalize_decoder=False),
    "layers.4.transcoder": SparseCoderConfig(num_latents=F, k=K, transcode=True, skip_connection=True),
}


@torch.no_grad()
def main():
    for seed, (name, config) in enumerate(CODERS.items()):
        generator = torch.Generator().manual_seed(seed)
        coder = SparseCoder(D, config)
        for tensor in coder.parameters():
            tensor.copy_((0.3 if tensor.dim() > 1 else 0.4) * torch.randn(tensor.shape, generator=generator))
        if config.normalize_decoder:
            coder.set_decoder_norm_to_unit_norm()
        folder = HERE / name
        coder.save_to_disk(folder)

        loaded = SparseCoder.load_from_disk(folder)
        x = torch.randn(N, D, generator=generator) + 0.5
        out = loaded(x)
        f = torch.zeros(N, F).scatter(1, out.latent_indices, out.latent_acts)
        expected = {"x": x, "f": f, "x_hat": out.sae_out, "norms": loaded.W_dec.norm(dim=-1)}
        save_file({key: value.contiguous() for key, value in expected.items()}, folder / "expected.safetensors")
    versions = {package: version(package) for package in ("eai-sparsify", "torch")}
    (HERE / "versions.json").write_text(json.dumps(versions, indent=1) + "\n")


if __name__ == "__main__":
    main()
