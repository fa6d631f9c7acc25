"""Which device computes, what it is called and how much memory it has. torch is imported only when asked."""

from __future__ import annotations

from dataclasses import dataclass

import psutil


@dataclass(frozen=True)
class Device:
    """`name` is torch's (cpu, cuda:0, mps), `kind` its part before the colon, `label` what a person calls it."""

    name: str
    kind: str
    label: str
    memory_bytes: int


class DeviceError(Exception):
    """The device that was asked for is not here; one sentence says what to do."""


def pick_device(asked: str = "auto") -> Device:
    """`auto` takes the first CUDA (or ROCm) GPU, then Apple's, then the CPU. Raises DeviceError."""
    try:
        import torch
    except ImportError:
        raise DeviceError(
            "the native engine needs torch: pip install 'gridmill[node]', or use --engine echo, which needs none"
        ) from None
    has_cuda, has_mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if asked == "auto":
        asked = "cuda" if has_cuda else "mps" if has_mps else "cpu"
    kind, _, number = asked.partition(":")
    if kind == "cuda":
        count = torch.cuda.device_count() if has_cuda else 0
        index = int(number or 0)
        if index >= count:
            found = (
                f"{count} found" if count else "none found: check the driver, and that torch was installed with CUDA"
            )
            raise DeviceError(f"--device {asked} is not here ({found}); --device cpu always works")
        properties = torch.cuda.get_device_properties(index)
        return Device(f"cuda:{index}", "cuda", str(properties.name), int(properties.total_memory))
    memory_bytes = int(psutil.virtual_memory().total)
    if kind == "mps":
        if not has_mps:
            raise DeviceError("--device mps needs a Mac with Apple silicon; --device cpu always works")
        return Device("mps", "mps", "Apple GPU", memory_bytes)
    return Device("cpu", "cpu", f"CPU with {psutil.cpu_count() or 1} threads", memory_bytes)
