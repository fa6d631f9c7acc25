"""The admission test: may this family's rows be computed together, and its layers apart?

1. The answer comes from a twin: a tiny random model with the real config's kinds of layers, windows, experts, caps and
   rotations. It takes a second whatever the size of the real model, and no list of families exists anywhere.
2. A twin goes through the same files, the same loader and the same Runner as the real model.
3. What cannot be tested counts as not working.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from gridmill.node.engines.native.runner import Row, Runner
from gridmill.node.engines.native.slice import ModelUnsupported, quiet

LAYERS = 6
TOLERANCE = 1e-3  # of the spread of the logits; float32 noise is a thousand times less, a wrong mask a hundred more
PROMPTS = (5, 18, 27)
STEPS = 12
SMALL = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "shared_intermediate_size": 32,
    "num_attention_heads": 4,
    "head_dim": 16,
    "vocab_size": 256,
    "vocab_size_per_layer_input": 256,
    "hidden_size_per_layer_input": 16,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_topk": 2,
    "n_group": 1,
    "topk_group": 1,
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 12,
    "sliding_window": 8,
    "attention_chunk_size": 8,
}
PARAMETERS_MAX = 4_000_000  # more means that some size has a name we do not know


@dataclass(slots=True)
class Findings:
    """What the twin showed. A model whose `faithful` is false must not be served by the native engine at all."""

    faithful: bool = False  # one sequence alone gives what plain transformers gives
    batches: bool = False  # a ragged batch gives what each row gives alone
    cuts: bool = False  # three ranges give bit by bit what the whole gives
    exact: bool = False  # exact mode gives the same bits alone, batched, in chunks and at any place in memory
    details: list[str] = field(default_factory=list)  # one sentence for everything that failed


def admission_test(config: Any, *, exact: bool = True) -> Findings:
    """Tests a tiny twin of the model with this config, on a CPU. Never raises for what the model does wrong."""
    findings = Findings()
    with tempfile.TemporaryDirectory(prefix="gridmill-twin-") as name:
        folder = Path(name)
        whole: list[Runner] = []  # one runner over all layers, made by the first check
        try:
            model = _save_twin(config, folder)
        except Exception as error:  # noqa: BLE001 - a config we cannot shrink may fail in any way, and is then reported
            findings.details.append(f"no twin of {config.model_type} can be built ({type(error).__name__}: {error}).")
            return findings
        _try(findings, "faithful", lambda: _faithful(model, folder, whole))
        if findings.faithful:
            _try(findings, "batches", lambda: _batches(whole))
            _try(findings, "cuts", lambda: _cuts(folder, model.config.num_hidden_layers, whole))
            if exact:
                _try(findings, "exact", lambda: _exact(folder))
    return findings


def twin_config(config: Any) -> Any:
    """A copy of `config` with everything small, and every kind of layer that the original has."""
    total = config.num_hidden_layers
    small = copy.deepcopy(config)
    kept = _kinds_of_layers(config)
    heads = getattr(config, "num_attention_heads", 1)
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    for name, value in list(vars(small).items()):
        if isinstance(value, (list, tuple)) and len(value) == total and not name.startswith("_"):
            setattr(small, name, [value[number] for number in kept])
        elif name in SMALL and isinstance(value, int) and not isinstance(value, bool) and value > 0:
            setattr(small, name, SMALL[name])
        elif name.endswith("_token_id") and value is not None:
            setattr(small, name, 0)
    small.num_hidden_layers = len(kept)
    if hasattr(small, "num_key_value_heads"):
        small.num_key_value_heads = 1 if kv_heads == 1 else 4 if kv_heads == heads else 2
    for name in ("first_k_dense_replace", "max_window_layers"):
        if isinstance(getattr(small, name, None), int):
            setattr(small, name, sum(number < getattr(config, name) for number in kept))
    if getattr(small, "mlp_only_layers", None):
        small.mlp_only_layers = [place for place, number in enumerate(kept) if number in config.mlp_only_layers]
    rotated = getattr(config, "qk_rope_head_dim", None)
    if rotated and getattr(config, "head_dim", None) == rotated:
        small.head_dim = small.qk_rope_head_dim
    half = _rotated(small) // 2
    for rope in _rope_parameters(small):
        for name in ("short_factor", "long_factor"):
            if isinstance(rope.get(name), list):
                rope[name] = rope[name][:half]
                # The twin's sequences count as long ones, whose frequencies are what we serve with.
                rope["original_max_position_embeddings"] = 4
                small.original_max_position_embeddings = 4
    return small


def _kinds_of_layers(config: Any) -> list[int]:
    """Numbers of at most LAYERS layers that include one of every kind, in order."""
    total = config.num_hidden_layers
    per_layer = [v for k, v in vars(config).items() if isinstance(v, (list, tuple)) and len(v) == total and k[0] != "_"]
    dense = getattr(config, "first_k_dense_replace", None)
    alone = set(getattr(config, "mlp_only_layers", None) or ())
    seen: dict[tuple[str, ...], int] = {}
    for number in range(total):
        kind = [str(values[number]) for values in per_layer]
        kind += [str(number in alone), str(isinstance(dense, int) and number < dense)]
        seen.setdefault(tuple(kind), number)
    kept = sorted(seen.values())[:LAYERS]
    kept += [number for number in range(total) if number not in kept][: LAYERS - len(kept)]
    return sorted(kept)


def _rotated(config: Any) -> int:
    """How many dimensions of a head are rotated."""
    mla = getattr(config, "qk_rope_head_dim", None)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    partial = next(
        (rope["partial_rotary_factor"] for rope in _rope_parameters(config) if "partial_rotary_factor" in rope), 1.0
    )
    return int(mla or head_dim * (getattr(config, "partial_rotary_factor", None) or partial))


def _rope_parameters(config: Any) -> list[dict[str, Any]]:
    """The rotation's settings: one dict, or one per kind of layer."""
    rope = getattr(config, "rope_parameters", None)
    if not isinstance(rope, dict):
        return []
    nested = [value for value in rope.values() if isinstance(value, dict)]
    return nested or [rope]


def _save_twin(config: Any, folder: Path) -> Any:
    small = twin_config(config)
    with quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        small._attn_implementation = "eager"
        with torch.device("meta"):
            count = sum(parameter.numel() for parameter in AutoModelForCausalLM.from_config(small).parameters())
        if count > PARAMETERS_MAX:
            raise ModelUnsupported(f"the twin would have {count} parameters")
        model = AutoModelForCausalLM.from_config(small, attn_implementation="eager").to(torch.float32).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                # Wide enough that every layer changes the result, so that a wrong one shows.
                if parameter.dim() > 1:
                    parameter.normal_(0.0, 0.15)
                else:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
        model.save_pretrained(folder)
    return model


def _try(findings: Findings, name: str, check: Callable[[], str]) -> None:
    """Sets one finding. `check` returns what is wrong, or nothing."""
    try:
        problem = check()
    except Exception as error:  # noqa: BLE001 - whatever a family's code does wrong is a finding
        problem = f"{type(error).__name__}: {error}"
    setattr(findings, name, not problem)
    if problem:
        findings.details.append(f"{name}: {problem}")


def _sequences() -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(2, 256, (length + STEPS,), generator=generator).tolist() for length in PROMPTS]


def _tables(scattered: bool) -> list[list[int]]:
    """Page tables for the three sequences: neighbours, or spread over the pool."""
    if not scattered:
        return [list(range(at, at + 3)) for at in (0, 3, 6)]
    return [[11, 2, 7], [0, 9, 5], [4, 10, 1]]


def _runner(folder: Path, layers: tuple[int, int] | None = None, *, exact: bool = False) -> Runner:
    return Runner(folder, layers=layers, dtype="float32", device="cpu", exact=exact, kv_pages=12)


def _run(stages: list[Runner], rows: list[tuple[int, list[int], list[int]]]) -> list[torch.Tensor]:
    """Logits of every new token of every row, through one runner or a chain of them. A row: position, pages, ids."""
    counts = [len(ids) for _, _, ids in rows]
    out = stages[0].forward([Row(position, pages, ids, logits=len(ids)) for position, pages, ids in rows])
    for stage in stages[1:]:
        parts = out.split(counts)
        out = stage.forward([Row(r[0], r[1], None, part, len(r[2])) for r, part in zip(rows, parts, strict=True)])
    return list(out.split(counts))


def _generate(stages: list[Runner], sequences: list[list[int]], tables: list[list[int]]) -> torch.Tensor:
    """Prompts in one pass, then one token of each sequence a pass; the logits of all tokens, sequence by sequence."""
    lengths = [len(ids) - STEPS for ids in sequences]
    batch = list(zip(lengths, tables, sequences, strict=True))
    logits = [[part] for part in _run(stages, [(0, pages, ids[:length]) for length, pages, ids in batch])]
    for step in range(STEPS):
        rows = [(length + step, pages, [ids[length + step]]) for length, pages, ids in batch]
        for kept, part in zip(logits, _run(stages, rows), strict=True):
            kept.append(part)
    return torch.cat([torch.cat(kept) for kept in logits])


def _faithful(model: Any, folder: Path, whole: list[Runner]) -> str:
    whole.append(_runner(folder))
    ids = _sequences()[-1]
    with torch.inference_mode():
        expected = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].float()
    got = _generate(whole, [ids], _tables(scattered=False)[:1])
    return _far(got, expected, "a sequence alone differs from plain transformers")


def _batches(whole: list[Runner]) -> str:
    together = _generate(whole, _sequences(), _tables(scattered=True))
    pairs = zip(_sequences(), _tables(scattered=False), strict=True)
    alone = torch.cat([_generate(whole, [ids], [pages]) for ids, pages in pairs])
    return _far(together, alone, "a batch differs from its rows alone")


def _cuts(folder: Path, total: int, whole: list[Runner]) -> str:
    if total < 3:
        return f"a model of {total} layers has no three ranges"
    edges = [0, total // 3, total // 3 + 1, total]
    stages = [_runner(folder, layers) for layers in pairwise(edges)]
    tables = _tables(scattered=True)
    cut, uncut = _generate(stages, _sequences(), tables), _generate(whole, _sequences(), tables)
    return "" if torch.equal(cut, uncut) else "three ranges differ from the whole"


def _exact(folder: Path) -> str:
    runner = _runner(folder, exact=True)
    if not runner.exact_holds:
        return "no batch size gives the same bits at every place on this machine"
    together = _generate([runner], _sequences(), _tables(scattered=True))
    one_by_one = [
        torch.cat([_run([runner], [(at, pages, [token])])[0] for at, token in enumerate(ids)])
        for ids, pages in zip(_sequences(), _tables(scattered=False), strict=True)
    ]
    return "" if torch.equal(together, torch.cat(one_by_one)) else "exact mode gives other bits in company than alone"


def _far(got: torch.Tensor, expected: torch.Tensor, sentence: str) -> str:
    if not bool(torch.isfinite(got).all() & torch.isfinite(expected).all()):
        return f"{sentence}: not all logits are finite"
    worst = float((got - expected).abs().max() / expected.std().clamp_min(1e-6))
    return "" if worst < TOLERANCE else f"{sentence} by {worst:.2g} of the logits' spread"
