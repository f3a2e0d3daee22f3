"""Records what SAELens itself computes, in the environment it is installed in.

    pip install sae-lens==6.54.0
    python tests/sae/recorded/record_saelens.py

For each architecture and option a folder with `cfg.json` and `sae_weights.safetensors` written by SAELens, small and
random with a decoder that is not normalised, and `expected.safetensors`: inputs x, features f and reconstruction x_hat
of the SAE that its own `load_from_disk` reads there, and the length of what one unit of each feature writes.

`*_old` folders have the config of SAELens 3 to 5, `*_training` folders what a training run saves before it ends.
"""

import json
from importlib.metadata import version
from pathlib import Path

import torch
from sae_lens import (
    SAE,
    BatchTopKTrainingSAE,
    BatchTopKTrainingSAEConfig,
    GatedSAE,
    GatedSAEConfig,
    JumpReLUSAE,
    JumpReLUSAEConfig,
    StandardSAE,
    StandardSAEConfig,
    TopKSAE,
    TopKSAEConfig,
    Transcoder,
    TranscoderConfig,
)
from sae_lens.saes.sae import SAEMetadata
from safetensors.torch import save_file

D, F, K, N = 16, 48, 5, 24
HERE = Path(__file__).parent / "saelens"
METADATA = {"model_name": "gpt2-small", "hook_name": "blocks.3.hook_resid_post", "hook_head_index": None}


def config(kind, **options):
    metadata = SAEMetadata(**METADATA, sae_lens_version=version("sae-lens"))
    return kind(d_in=D, d_sae=F, metadata=metadata, **options)


def saes():
    """The SAE of each folder."""
    yield "standard", StandardSAE(config(StandardSAEConfig))
    yield "standard_uncentred", StandardSAE(config(StandardSAEConfig, apply_b_dec_to_input=False))
    yield "standard_layer_norm", StandardSAE(config(StandardSAEConfig, normalize_activations="layer_norm"))
    yield "topk", TopKSAE(config(TopKSAEConfig, k=K))
    yield "topk_rescaled", TopKSAE(config(TopKSAEConfig, k=K, rescale_acts_by_decoder_norm=True))
    yield "topk_constant_norm", TopKSAE(config(TopKSAEConfig, k=K, normalize_activations="constant_norm_rescale"))
    yield "jumprelu", JumpReLUSAE(config(JumpReLUSAEConfig, apply_b_dec_to_input=False))
    yield "gated", GatedSAE(config(GatedSAEConfig))
    yield "standard_old", StandardSAE(config(StandardSAEConfig))
    yield "topk_old", TopKSAE(config(TopKSAEConfig, k=K))


def old_config(name):
    """A config as SAELens 3 wrote it, for the architecture in the folder's name."""
    old = {"d_in": D, "d_sae": F, "dtype": "torch.float32", "device": "cpu", "model_name": "gpt2-small"}
    old |= {"hook_point": "blocks.3.hook_resid_pre", "hook_point_layer": 3, "hook_point_head_index": None}
    old |= {"activation_fn_str": "relu", "normalize_activations": False, "prepend_bos": True, "context_size": 128}
    if name.startswith("topk"):
        old |= {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": K}}
    return old


@torch.no_grad()
def randomise(sae, generator):
    for name, tensor in sae.named_parameters():
        tensor.copy_((0.3 if tensor.dim() > 1 else 0.4) * torch.randn(tensor.shape, generator=generator))
        if name == "threshold":
            tensor.abs_()


@torch.no_grad()
def record(folder, generator, *, copies=()):
    sae = SAE.load_from_disk(folder)
    x = torch.randn(N, D, generator=generator) + 0.5
    rescaled = getattr(sae.cfg, "rescale_acts_by_decoder_norm", False)  # f is then in units of unit decoder rows
    norms = torch.ones(F) if rescaled else sae.W_dec.norm(dim=-1)
    expected = {"x": x, "f": sae.encode(x), "x_hat": sae(x), "norms": norms}
    for target in (folder, *copies):
        save_file({key: value.contiguous() for key, value in expected.items()}, target / "expected.safetensors")


def main():
    for seed, (name, sae) in enumerate(saes()):
        generator = torch.Generator().manual_seed(seed)
        randomise(sae, generator)
        sae.save_model(HERE / name)
        if name.endswith("old"):
            (HERE / name / "cfg.json").write_text(json.dumps(old_config(name), indent=1) + "\n")
        record(HERE / name, generator)
    for seed, rescale in enumerate((True, False), start=100):
        generator = torch.Generator().manual_seed(seed)
        sae = BatchTopKTrainingSAE(config(BatchTopKTrainingSAEConfig, k=K, rescale_acts_by_decoder_norm=rescale))
        randomise(sae, generator)
        sae.topk_threshold.fill_(0.8)
        name = "batchtopk_rescaled" if rescale else "batchtopk"
        sae.save_model(HERE / f"{name}_training")
        sae.save_inference_model(HERE / name)
        record(HERE / name, generator, copies=[HERE / f"{name}_training"])
    Transcoder(config(TranscoderConfig, d_out=D, apply_b_dec_to_input=False)).save_model(HERE / "transcoder")
    versions = {package: version(package) for package in ("sae-lens", "torch")}
    (HERE / "versions.json").write_text(json.dumps(versions, indent=1) + "\n")


if __name__ == "__main__":
    main()
