"""What one sampled id costs on this machine: the canonical sampler beside torch.multinomial(softmax) in the same run.

Both are fed the same float32 logits, rows at a time, on one thread. The reference is what most serving code does: it
filters with torch.topk or torch.sort, ignores ties and draws from an unseeded state; it has no penalties of its own, so
there it is timed without them. Prints processor milliseconds per row (median of the repeats; processor time, so that
neighbours on the machine disturb less) and writes every figure as JSON.
Logits are random: "flat" is normal with deviation 1, "peaked" adds what a trained model adds, a few ids far ahead.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from gridmill.node.engines.native.sampler import SamplingState, choose
from gridmill.wire.sampling import Sampling

VOCABULARIES = {1_536: (1, 16, 64), 32_000: (1, 16, 64), 150_000: (1, 16)}  # of the demo model, small, large: rows
MODES: dict[str, dict[str, float]] = {
    "greedy": {"temperature": 0.0},
    "T=1": {},
    "top_p=0.9": {"top_p": 0.9},
    "top_k=50": {"top_k": 50},
    "penalties": {"repetition_penalty": 1.1, "presence_penalty": 0.5, "frequency_penalty": 0.2},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "sampler.json")
    parser.add_argument("--seconds", type=float, default=0.12, help="time spent on each figure")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results = []
    print("vocabulary  logits       mode rows  ours ms/row  torch ms/row  ratio")
    for vocab_size, rows_at_once in VOCABULARIES.items():
        for shape in ("peaked", "flat"):
            all_logits = make_logits(shape, max(rows_at_once), vocab_size)
            for mode, parameters in MODES.items():
                for rows in rows_at_once:
                    logits = all_logits[:rows]
                    states = make_states(rows, vocab_size, parameters)
                    ours = milliseconds(lambda: choose(logits, states), arguments.seconds)  # noqa: B023
                    theirs = milliseconds(lambda: reference(logits, parameters), arguments.seconds)  # noqa: B023
                    mine, other = statistics.median(ours) / rows, statistics.median(theirs) / rows
                    line = f"{vocab_size:>10} {shape:>7} {mode:>10} {rows:>4}"
                    print(f"{line} {mine:>12.3f} {other:>13.3f} {other / mine:>6.1f}", flush=True)
                    results.append(
                        {
                            "vocabulary": vocab_size,
                            "logits": shape,
                            "mode": mode,
                            "rows": rows,
                            "ours_ms_per_row": round(mine, 5),
                            "ours_ms_per_row_all": [round(value / rows, 5) for value in ours],
                            "torch_multinomial_ms_per_row": round(other, 5),
                            "torch_multinomial_ms_per_row_all": [round(value / rows, 5) for value in theirs],
                        }
                    )
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    machine = {
        "cpus": os.cpu_count(),
        "processor": platform.machine(),
        "torch": torch.__version__,
        "numpy": np.__version__,
    }
    arguments.out.write_text(
        json.dumps({"machine": machine, "threads": 1, "clock": "processor time", "results": results}, indent=1) + "\n"
    )


def make_logits(shape: str, rows: int, vocab_size: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(7)
    logits = torch.randn(rows, vocab_size, generator=generator)
    if shape == "peaked":
        logits *= 2.5
        ahead = torch.randint(0, vocab_size, (rows, 8), generator=generator)
        logits.scatter_(1, ahead, 14.0 + 2.0 * torch.randn(rows, 8, generator=generator))
    return logits


def make_states(rows: int, vocab_size: int, parameters: dict[str, float]) -> list[SamplingState]:
    """Sessions in mid-answer: 1 000 prompt ids and 100 output ids, which is what penalties have to look at."""
    ids = [(i * 7919) % vocab_size for i in range(1_100)]
    seeds = [hashlib.sha256(bytes([row])).digest() for row in range(rows)]
    samplings = [Sampling(seed=seed, max_tokens=4096, **parameters) for seed in seeds]  # type: ignore[arg-type]
    return [SamplingState(s, ids[:1_000], ids[1_000:], (2,), vocab_size, "cpu") for s in samplings]


def reference(logits: torch.Tensor, parameters: dict[str, float]) -> list[int]:
    if parameters.get("temperature") == 0.0:
        return logits.argmax(-1).tolist()
    if "top_k" in parameters:
        values, ids = torch.topk(logits, int(parameters["top_k"]), dim=-1)
        return ids.gather(1, torch.multinomial(torch.softmax(values, -1), 1))[:, 0].tolist()
    if "top_p" in parameters:
        values, ids = torch.sort(logits, descending=True, dim=-1)
        chances = torch.softmax(values, -1)
        chances[chances.cumsum(-1) - chances >= parameters["top_p"]] = 0.0
        return ids.gather(1, torch.multinomial(chances, 1))[:, 0].tolist()
    return torch.multinomial(torch.softmax(logits, -1), 1)[:, 0].tolist()


def milliseconds(work: Callable[[], object], seconds: float) -> list[float]:
    work()
    taken: list[float] = []
    end = time.perf_counter() + seconds
    while len(taken) < 2 or (len(taken) < 25 and time.perf_counter() < end):
        start = time.thread_time()
        work()
        taken.append((time.thread_time() - start) * 1e3)
    return taken


if __name__ == "__main__":
    main()
