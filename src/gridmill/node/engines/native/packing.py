"""Linear layers on a CPU: weights packed once for oneDNN, instead of copied into kernel order on every call.

1. A layer's arithmetic stays its own, y = x W^T + b; only the kernel that does it changes.
2. In exact mode one layer uses one kernel for every batch size, because two kernels round differently.
3. Elsewhere the cheaper kernel is taken by size: oneDNN's call costs about 9 microseconds, MKL's packing costs more
   than that from about a million multiplications on (on a Zen 5 core oneDNN is 2 times faster at 16 rows of 512x1376).
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.nn import functional

PACK_ELEMENTS_MIN = 1 << 17  # exact mode: smaller matrices are as fast in MKL at any batch, see rule 3
PACK_WORK_MIN = 1 << 20  # otherwise: multiplications per call from which the packed kernel wins
DROP_ELEMENTS_MIN = 1 << 18  # from here, read from memory, the packed weights win even for one row; we keep only them


class PackedLinear:
    """What a Linear calls instead of its own forward."""

    __slots__ = ("bias", "elements", "in_features", "packed", "weight")

    def __init__(self, linear: Any, *, keep: bool) -> None:
        self.packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), 16)
        self.weight: torch.Tensor | None = linear.weight.detach() if keep else None
        self.bias: torch.Tensor | None = None if linear.bias is None else linear.bias.detach()
        self.in_features: int = linear.in_features
        self.elements: int = linear.in_features * linear.out_features

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self.weight is not None:
            rows = x.numel() // self.in_features
            if rows == 1 or rows * self.elements < PACK_WORK_MIN:
                return functional.linear(x, self.weight, self.bias)
        packed: torch.Tensor = torch.ops.mkldnn._linear_pointwise.default(x, self.packed, self.bias, "none", [], "")
        return packed


def pack_linears(modules: Iterable[Any], *, exact: bool) -> int:
    """Packs every plain Linear that gains by it and returns how many. Weights shared with an embedding stay as well."""
    if not packing_works():
        return 0
    modules = list(modules)
    tables = {id(module.weight) for module in modules if isinstance(module, nn.Embedding)}
    count = 0
    for module in modules:
        if type(module) is not nn.Linear or "forward" in module.__dict__ or module.weight.device.type != "cpu":
            continue
        if module.weight.dtype is not torch.float32:
            continue
        elements = module.in_features * module.out_features
        if exact and elements < PACK_ELEMENTS_MIN:
            continue
        keep = not exact and elements < DROP_ELEMENTS_MIN
        module.forward = PackedLinear(module, keep=keep)
        if not keep and id(module.weight) not in tables:
            module.weight = nn.Parameter(module.weight.new_empty(0), requires_grad=False)
        count += 1
    return count


@cache
def packing_works() -> bool:
    """Whether this build of torch has oneDNN's packed linear, and it computes what F.linear computes."""
    if not torch.backends.mkldnn.is_available():
        return False
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(48, 32, generator=generator), torch.randn(1, 5, 32, generator=generator)
    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, 16)
        result = torch.ops.mkldnn._linear_pointwise.default(x, packed, None, "none", [], "")
    except (AttributeError, RuntimeError, NotImplementedError):
        return False
    return bool(torch.allclose(result, functional.linear(x, weight), atol=1e-4))
