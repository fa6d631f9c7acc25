"""Tiny random models of eighteen families, written to a folder the way a checkpoint from the Hub is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
ROUTED = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_group": 1, "topk_group": 1}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 8},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "mixtral": {"num_local_experts": 4},
    "qwen3_moe": {**MOE, "decoder_sparse_step": 1, "head_dim": 16},
    "gemma": {"head_dim": 16},
    "gemma2": {"head_dim": 16, "sliding_window": 8},
    "gemma3_text": {"head_dim": 16, "sliding_window": 8},
    "phi3": {"pad_token_id": 0},
    "olmo2": {},
    "cohere2": {"sliding_window": 8},
    "smollm3": {"pad_token_id": 0},
    "glm4": {"head_dim": 16, "pad_token_id": 0},
    "glm4_moe": {**ROUTED, "first_k_dense_replace": 1, "head_dim": 16, "n_shared_experts": 1, "pad_token_id": 0},
    "deepseek_v3": {
        **ROUTED,
        "num_key_value_heads": 4,
        "q_lora_rank": None,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 16,
        "v_head_dim": 12,
        "first_k_dense_replace": 1,
        "n_shared_experts": 1,
    },
    "gpt_oss": {"num_local_experts": 4, "head_dim": 16, "sliding_window": 8},
    "granite": {"embedding_multiplier": 12.0, "residual_multiplier": 0.22, "logits_scaling": 4.0},
}
SIZES: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 64,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
    "max_position_embeddings": 256,
}


def tiny_model(model_type: str, *, seed: int = 0, **changes: Any) -> Any:
    """A random CausalLM in float32, weights wide enough that every layer changes the result."""
    config = AutoConfig.for_model(model_type, **{**SIZES, **FAMILIES.get(model_type, {}), **changes})
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).to(torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.15)
            elif parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def save_tiny(folder: Path, model_type: str, *, seed: int = 0, **changes: Any) -> Any:
    """Writes the model to `folder` and returns it."""
    model = tiny_model(model_type, seed=seed, **changes)
    model.save_pretrained(folder, max_shard_size="200KB")
    return model
