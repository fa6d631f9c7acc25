"""Loads the native engine: CPU threads, the admission test on a tiny twin, then the weights.

1. What the twin shows decides how the model is served (together, one request at a time, not at all); the node says so.
2. Findings are kept per config and library versions (DATA/admission.json), because the test costs seconds.
3. torch and transformers are imported here and below, never above: echo needs neither.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import psutil

from gridmill import __version__
from gridmill.node.engines.base import Engine
from gridmill.node.hardware import Device
from gridmill.node.hub import write_whole
from gridmill.node.models import LocalModel, ModelError

if TYPE_CHECKING:
    from gridmill.node.engines.native.families import Findings

log = logging.getLogger("gridmill.node")


class ExactRefused(ModelError):
    """Exact mode was wanted and does not hold here."""


FINDINGS_KEPT_MAX = 100  # a person who tries more models than this repeats a test of a few seconds


def load_native_engine(
    local: LocalModel,
    device: Device,
    *,
    data: Path,
    slots: int,
    kv_bytes: int | None,
    threads: int | None,
    trust_remote_code: bool,
    progress: Callable[[str, float], None],
) -> Engine:
    """Blocks for seconds to minutes: call it from a thread. Raises ModelError."""
    import torch

    from gridmill.node.engines.native.engine import ExactNotHeld, load_native

    # One core stays free for the event loop: threads that wait for each other at every layer stand still together.
    cores = psutil.cpu_count(logical=False) or psutil.cpu_count() or 1
    torch.set_num_threads(threads or max(1, min(torch.get_num_threads(), cores - 1)))
    try:
        findings = _findings(local, data / "admission.json", trust_remote_code=trust_remote_code)
        engine = load_native(
            local.folder,
            local.name,
            local.model_class,
            local.facts,
            local.files,
            dtype=local.dtype,
            device=device.name,
            exact=local.exact,
            kv_bytes=kv_bytes,
            slots=slots,
            trust_remote_code=trust_remote_code,
            findings=findings,
            progress=progress,
        )
    except ExactNotHeld as error:
        raise ExactRefused(f"{local.name}: {error}; --no-exact serves it as another class") from error
    except (OSError, ValueError, RuntimeError, MemoryError, ImportError) as error:
        # ValueError is what slice.ModelUnsupported is; RuntimeError is what torch raises when memory runs out.
        log.debug("loading failed", exc_info=True)
        sentence = str(error).strip().split("\n")[0].rstrip(".") or type(error).__name__
        raise ModelError(f"{local.name} cannot be loaded on {device.label}: {sentence}") from error
    for note in engine.notes:
        log.warning("%s: %s", local.name, note)
    return engine


def _findings(local: LocalModel, path: Path, *, trust_remote_code: bool) -> Findings:
    """What the admission test says of this model, from memory where it was asked before. Raises ModelUnsupported."""
    import torch
    import transformers

    from gridmill.node.engines.native.families import Findings, admission_test
    from gridmill.node.engines.native.slice import read_config

    if local.facts.toy:
        # It ships with the project, whose own tests are the admission test of exactly this model.
        return Findings(faithful=True, batches=True, cuts=True, exact=True)
    config_sha256 = hashlib.sha256((local.folder / "config.json").read_bytes()).hexdigest()
    key = f"{config_sha256[:32]} exact={local.exact} {torch.__version__} {transformers.__version__} {__version__}"
    try:
        known = msgspec.json.decode(path.read_bytes(), type=dict[str, Findings])
    except (OSError, msgspec.MsgspecError):
        known = {}  # a lost memory costs one more test
    if key not in known:
        log.info("testing a tiny twin of %s", local.name)
        config = read_config(local.folder, trust_remote_code=trust_remote_code)
        known[key] = admission_test(config, exact=local.exact)
        write_whole(path, msgspec.json.encode(dict(list(known.items())[-FINDINGS_KEPT_MAX:])))
    return known[key]
