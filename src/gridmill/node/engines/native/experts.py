"""Experts for exact mode: a token's share in a mixture does not depend on which tokens sit beside it.

transformers calls `exact_experts` instead of the family's own loop. Each expert multiplies its tokens in calls of at
least ROWS_MIN rows, where the kernel's bits no longer depend on the number of rows, and a token's experts are added in
the order its router named them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

EXPERTS = "gridmill_exact"
ROWS_MIN = 16  # also a multiple of the vector width, so that activations see whole vectors
ROWS_MAX = 128


def exact_experts(
    module: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """hidden_states [tokens, hidden], both others [tokens, k] → [tokens, hidden]."""
    tokens, chosen = top_k_index.shape
    outputs = hidden_states.new_zeros(tokens * chosen, hidden_states.shape[1])
    flat = top_k_index.reshape(-1)
    order = torch.argsort(flat, stable=True)
    counts = torch.bincount(flat, minlength=module.num_experts)[: module.num_experts].tolist()
    start = 0
    for expert, count in enumerate(counts):
        for low in range(start, start + count, ROWS_MAX):
            pairs = order[low : min(low + ROWS_MAX, start + count)]
            rows = hidden_states[pairs // chosen]
            if len(pairs) % ROWS_MIN:
                rows = functional.pad(rows, (0, 0, 0, ROWS_MIN - len(pairs) % ROWS_MIN))
            up = "gate_up_proj" if module.has_gate else "up_proj"
            middle = _linear(module, up, expert, rows)
            middle = module._apply_gate(middle) if module.has_gate else module.act_fn(middle)
            result = _linear(module, "down_proj", expert, middle)
            if module.has_post_expert_norm:
                result = module.post_expert_norm(result)
            outputs[pairs] = result[: len(pairs)]
        start += count
    weighted = outputs.view(tokens, chosen, -1) * top_k_weights[:, :, None].to(outputs.dtype)
    total = weighted[:, 0]
    for place in range(1, chosen):
        total = total + weighted[:, place]
    return total


def _linear(module: Any, name: str, expert: int, rows: torch.Tensor) -> torch.Tensor:
    weight = getattr(module, name)[expert]
    bias = getattr(module, f"{name}_bias")[expert] if module.has_bias else None
    return functional.linear(rows, weight.t() if module.is_transposed else weight, bias)


ALL_EXPERTS_FUNCTIONS.register(EXPERTS, exact_experts)
