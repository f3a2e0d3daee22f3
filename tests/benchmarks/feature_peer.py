"""SAEDashboard's panels for some features of one SAE of the bundled model, for `bench_features`; run by its own Python.

    PYTHON -m tests.benchmarks.feature_peer SAE_FOLDER TEXT --features 77 --tokens 150000

PYTHON has sae-dashboard 0.8, sae-lens 6, transformer-lens 2, numpy below 2.3 and no torchvision. SAE_FOLDER is of
`sfc convert --format saelens`. The model is TransformerLens' GPT-NeoX with the same weights (the largest difference of
log-probabilities is printed), the text packed end to end into contexts of 32 tokens, which is about its length a line.
Its `fold_W_dec_norm` is left out: rows have unit norm, and it refuses TopK SAEs.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from sae_dashboard.sae_vis_data import SaeVisConfig
from sae_dashboard.sae_vis_runner import SaeVisRunner
from sae_lens import SAE, HookedSAETransformer
from transformer_lens import HookedTransformerConfig
from transformer_lens.pretrained.weight_conversions.neox import convert_neox_weights
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

MODEL = Path(__file__).parents[2] / "examples" / "agreement" / "model"
LENGTH = 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sae")
    parser.add_argument("text", type=Path)
    parser.add_argument("--features", type=int, default=77)
    parser.add_argument("--tokens", type=int, default=150_000)
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    hf, tokenizer = AutoModelForCausalLM.from_pretrained(MODEL), PreTrainedTokenizerFast.from_pretrained(MODEL)
    model = hooked(hf, tokenizer)
    lines = options.text.read_text(encoding="utf-8").splitlines()
    ids = torch.tensor([tokenizer(lines[0])["input_ids"]])
    difference = model(ids).log_softmax(-1) - hf(ids).logits.log_softmax(-1)
    print(f"log p differs from transformers' by {float(difference.abs().max()):.1e}")
    sae = SAE.load_from_disk(options.sae)
    sae.fold_W_dec_norm = lambda: None
    flat = [id for line in lines for id in tokenizer(line)["input_ids"]][: options.tokens // LENGTH * LENGTH]
    start = time.process_time(), time.perf_counter()
    config = SaeVisConfig(
        hook_point=sae.cfg.metadata.hook_name, features=list(range(options.features)), device="cpu",
        minibatch_size_features=options.features, minibatch_size_tokens=256,
    )  # fmt: skip
    SaeVisRunner(config).run(encoder=sae, model=model, tokens=torch.tensor(flat).view(-1, LENGTH))
    cpu, wall = time.process_time() - start[0], time.perf_counter() - start[1]
    print(f"SAEDashboard, {options.features} features: {len(flat):,} tokens {cpu:.1f} s CPU {wall:.1f} s")


def hooked(hf: torch.nn.Module, tokenizer: PreTrainedTokenizerFast) -> HookedSAETransformer:
    """The bundled model in TransformerLens."""
    c = hf.config
    head = c.hidden_size // c.num_attention_heads
    config = HookedTransformerConfig(
        n_layers=c.num_hidden_layers, d_model=c.hidden_size, n_ctx=c.max_position_embeddings, d_head=head,
        n_heads=c.num_attention_heads, d_mlp=c.intermediate_size, d_vocab=c.vocab_size, act_fn="gelu",
        eps=c.layer_norm_eps, normalization_type="LN", positional_embedding_type="rotary", parallel_attn_mlp=True,
        rotary_dim=head // 4, rotary_adjacent_pairs=False, device="cpu",
    )  # fmt: skip
    model = HookedSAETransformer(config)
    model.load_state_dict(convert_neox_weights(hf, config), strict=False)
    model.set_tokenizer(tokenizer)
    return model.eval()


if __name__ == "__main__":
    main()
