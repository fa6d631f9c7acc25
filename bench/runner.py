"""Tokens per second of the Runner at 1, 4 and 16 rows, greedy, against `generate` one at a time, in one run.

    python bench/runner.py                       # a 15 M-parameter random Llama in float32
    python bench/runner.py --model DIR --tokens 64 --exact

Prints one JSON object. Run it with OMP_NUM_THREADS set to the threads you want to measure.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging

from gridmill.node.engines.native.runner import Row, Runner

SIZES = {
    "4M": {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 6, "heads": 6, "kv": 2, "vocab": 4096},
    "15M": {"hidden_size": 320, "intermediate_size": 864, "num_hidden_layers": 8, "heads": 10, "kv": 5, "vocab": 8192},
    "60M": {
        "hidden_size": 512,
        "intermediate_size": 1376,
        "num_hidden_layers": 12,
        "heads": 8,
        "kv": 4,
        "vocab": 16384,
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", type=Path, help="a model folder; default: a random Llama of --size")
    parser.add_argument("--size", choices=SIZES, default="15M")
    parser.add_argument("--prompt", type=int, default=100, help="prompt tokens per row")
    parser.add_argument("--tokens", type=int, default=64, help="tokens to generate per row")
    parser.add_argument("--rounds", type=int, default=3, help="measurements per figure; the best counts")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--profile", action="store_true", help="profile 16 rows instead")
    options = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as name:
        folder = options.model or random_llama(Path(name), SIZES[options.size])
        if options.profile:
            profile(folder, options.prompt, options.rows[-1])
        else:
            print(json.dumps(measure(folder, options), indent=2))


def random_llama(folder: Path, size: dict[str, int]) -> Path:
    config = AutoConfig.for_model(
        "llama",
        vocab_size=size["vocab"],
        hidden_size=size["hidden_size"],
        intermediate_size=size["intermediate_size"],
        num_hidden_layers=size["num_hidden_layers"],
        num_attention_heads=size["heads"],
        num_key_value_heads=size["kv"],
        max_position_embeddings=2048,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def measure(folder: Path, options: argparse.Namespace) -> dict[str, object]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    runners = {"normal": Runner(folder, dtype="float32"), "exact": Runner(folder, exact=True)}
    prompts = [
        torch.randint(
            3, model.config.vocab_size, (options.prompt,), generator=torch.Generator().manual_seed(row)
        ).tolist()
        for row in range(max(options.rows))
    ]
    generate_seconds = [float("inf")]
    seconds: dict[tuple[str, int], float] = {}
    # Rounds take turns, so that a busy machine slows the reference and us alike.
    for _ in range(options.rounds):
        generate_seconds.append(timed(lambda: generate(model, prompts[0], options.tokens)))
        for mode, runner in runners.items():
            for rows in options.rows:
                took = decode(runner, prompts[:rows], options.tokens)
                seconds[mode, rows] = min(took, seconds.get((mode, rows), float("inf")))
    reference = options.tokens / min(generate_seconds)
    figures: dict[str, object] = {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "threads": torch.get_num_threads(),
        "prompt_tokens": options.prompt,
        "generated_tokens": options.tokens,
        "generate_tokens_per_second": round(reference, 1),
    }
    for (mode, rows), took in seconds.items():
        rate = rows * options.tokens / took
        figures[f"{mode}_{rows}_rows"] = {"tokens_per_second": round(rate, 1), "ratio": round(rate / reference, 2)}
    return figures


def timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def generate(model: object, prompt: list[int], tokens: int) -> None:
    """Greedy, ended by nothing but the count, prompt included in the time, as in `decode`."""
    ids = torch.tensor([prompt])
    model.generate(  # type: ignore[attr-defined]
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        min_new_tokens=tokens,
        max_new_tokens=tokens,
        pad_token_id=0,
    )


def decode(runner: Runner, prompts: list[list[int]], tokens: int) -> float:
    """Seconds for all rows, prompts included. Each row's pages are neighbours, as the engine tries to make them."""
    held = -(-(len(prompts[0]) + tokens) // runner.page_tokens)
    tables = [list(range(row * held, (row + 1) * held)) for row in range(len(prompts))]
    start = time.perf_counter()
    logits = runner.forward([Row(0, table, ids, logits=1) for table, ids in zip(tables, prompts, strict=True)])
    chosen = logits.argmax(-1).tolist()
    for step in range(len(prompts[0]), len(prompts[0]) + tokens - 1):
        rows = [Row(step, table, [token], logits=1) for table, token in zip(tables, chosen, strict=True)]
        chosen = runner.forward(rows).argmax(-1).tolist()
    return time.perf_counter() - start


def profile(folder: Path, prompt: int, rows: int) -> None:
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as torch_profile

    for exact in (False, True):
        runner = Runner(folder, dtype="float32", exact=exact)
        prompts = [[5] * prompt for _ in range(rows)]
        decode(runner, prompts, 8)
        with torch_profile(activities=[ProfilerActivity.CPU]) as report:
            decode(runner, prompts, 16)
        print("exact" if exact else "normal")
        print(report.key_averages().table(sort_by="self_cpu_time_total", row_limit=22))


if __name__ == "__main__":
    main()
