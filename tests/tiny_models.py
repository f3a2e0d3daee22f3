"""Tiny random models of every decoder that transformers knows: width 32, two layers, a vocabulary of 63.

`tiny_config` sets the sizes that a family's config has, whatever it calls them; `SPECIAL_SIZES` holds what single
families need beyond that.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

VOCABULARY = 63
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32, "d_model": 32, "n_embd": 32, "dim": 32, "emb_dim": 32,
    "num_hidden_layers": 2, "n_layer": 2, "n_layers": 2, "num_layers": 2, "decoder_layers": 2,
    "num_attention_heads": 4, "n_head": 4, "n_heads": 4, "num_heads": 4, "decoder_attention_heads": 4,
    "num_key_value_heads": 2, "num_kv_heads": 2, "head_dim": 8,
    "intermediate_size": 64, "ffn_dim": 64, "n_inner": 64, "decoder_ffn_dim": 64, "ffn_hidden_size": 64,
    "shared_expert_intermediate_size": 32, "moe_intermediate_size": 32, "intermediate_size_mlp": 64,
    "num_local_experts": 4, "num_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_num_experts": 4,
    "n_shared_experts": 1, "n_group": 1, "topk_group": 1, "moe_topk": 2,
    "max_position_embeddings": 64, "n_positions": 64, "n_ctx": 64, "max_seq_len": 64,
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8,
    "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 4, "linear_num_value_heads": 4,
    "sliding_window": 4, "query_pre_attn_scalar": 8, "attention_window_size": 4,
    "state_size": 4, "mamba_d_state": 4, "mamba_d_conv": 4, "mamba_expand": 2, "expand": 2, "lru_width": 32,
    "rotary_dim": 8, "initializer_range": 0.1, "init_std": 0.1,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
SPECIAL_SIZES: dict[str, dict[str, Any]] = {
    "granite": {"residual_multiplier": 0.22, "embedding_multiplier": 3.0},
    "granitemoe": {"residual_multiplier": 0.22},
    "falcon": {"head_dim": None, "new_decoder_architecture": False, "parallel_attn": True},
    "gpt_neo": {"num_layers": 2, "attention_types": [[["global", "local"], 1]], "window_size": 4},
    "deepseek_v3": {"first_k_dense_replace": 1},
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 4},
    "bamba": {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_chunk_size": 4, "attn_layer_indices": [1]},
    "granitemoehybrid": {
        "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_chunk_size": 4, "shared_intermediate_size": 32,
        "layer_types": ["linear_attention", "full_attention"], "residual_multiplier": 0.22,
    },
    "gemma4_text": {
        "vocab_size_per_layer_input": 63, "hidden_size_per_layer_input": 8, "per_layer_config": {"1": {"head_dim": 8}},
    },
    "gemma3n_text": {
        "vocab_size_per_layer_input": 63, "hidden_size_per_layer_input": 8, "num_kv_shared_layers": 0, "laurel_rank": 8,
    },
    "kimi_linear": {"linear_head_dim": 8, "linear_num_heads": 4},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "llama4_text": {"interleave_moe_layer_step": 2},
    "gemma3": {
        "text_config": {
            "vocab_size": 63, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
            "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 64, "max_position_embeddings": 64,
            "query_pre_attn_scalar": 8, "initializer_range": 0.1,
        },
        "vision_config": {
            "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
            "image_size": 28, "patch_size": 14,
        },
        "initializer_range": "default", "image_token_index": 60, "boi_token_index": 61, "eoi_token_index": 62,
    },
    "jamba": {"num_hidden_layers": 2, "attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False},
}  # fmt: skip
FAMILIES = (
    "bloom", "cohere", "deepseek_v3", "falcon", "gemma3", "glm4", "gpt_neo", "gpt_oss", "granite", "jamba",
    "llama4_text", "mamba", "mixtral", "mpt", "olmo2", "opt", "phi3", "qwen3_moe",
)  # fmt: skip
"""Families that are tried in every run of the tests."""
MORE_FAMILIES = (
    "afmoe", "apertus", "arcee", "aria_text", "axk1", "axk2", "bamba", "bart", "beam", "bigbird_pegasus", "biogpt",
    "bitnet", "blenderbot", "blenderbot-small", "codegen", "cohere2", "cohere2_moe", "ctrl", "cwm", "deepseek_v2",
    "deepseek_v32", "deepseek_v4", "diffllama", "doge", "dots1", "dots3_note_text", "ernie4_5", "ernie4_5_moe",
    "exaone4", "exaone_moe", "falcon_mamba", "flex_olmo", "flint", "gemma", "gemma2", "gemma3_text", "gemma3n_text",
    "gemma4_text", "gemma4_unified_text", "glm", "glm4_moe", "glm4_moe_lite", "glm_moe_dsa", "gpt2", "gpt_bigcode",
    "gpt_neox", "gpt_neox_japanese", "gptj", "granite_swa", "granitemoe", "granitemoe_swa", "granitemoehybrid",
    "granitemoeshared", "helium", "hrm_text", "hunyuan_v1_dense", "hunyuan_v1_moe", "hy_v3", "hy_v4", "hyperclovax",
    "inkling2_text", "inkling_text", "jais2", "jetmoe", "kimi_linear", "kolibri1", "laguna", "lfm2", "lfm2_moe", "lfm3",
    "llama", "mamba2", "marian", "mbart", "mellum", "mimo_v2_flash", "minicpm3", "minimax", "minimax_m2",
    "minimax_m3_vl_text", "ministral", "ministral3", "mistral", "modernbert-decoder", "mvp", "nanochat", "nemotron",
    "nemotron_h", "olmo", "olmo3", "olmo_hybrid", "olmoe", "openai-gpt", "pegasus", "persimmon", "phi", "phimoe",
    "plbart", "qwen2", "qwen2_moe", "qwen3", "qwen3_5_text", "qwen3_next", "recurrent_gemma", "rwkv", "seed_oss",
    "smollm3", "solar_open", "stablelm", "starcoder2", "trocr", "vaultgemma", "whisper", "xglm", "youtu",
)  # fmt: skip
"""Families that `tests.benchmarks.architectures` tries beside them."""


def tiny_config(model_type: str) -> Any:
    """The family's config with every size small."""
    config_class = type(AutoConfig.for_model(model_type))
    fields = set(inspect.signature(config_class.__init__).parameters) | set(dir(config_class))
    fields |= set(getattr(config_class, "attribute_map", {}))
    sizes = {name: value for name, value in SIZES.items() if name in fields}
    if "kv_lora_rank" in sizes:  # latent attention has no groups of heads
        sizes |= {"num_key_value_heads": 4, "head_dim": None}
    sizes |= SPECIAL_SIZES.get(model_type, {})
    return AutoConfig.for_model(model_type, **{name: x for name, x in sizes.items() if x not in (None, "default")})


def tiny_model(model_type: str, *, seed: int = 0) -> PreTrainedModel:
    """A random model whose parameters all differ from their constants."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(model_type))
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model.float().eval()
