"""Native engine against transformers `generate`, one request at a time, in the same process and run.

Tokens per second at several concurrencies, normal and exact mode, over the demo model (or a random one of its size) and
a random Llama of 25 million parameters. Both sides sample at temperature 1 and produce the same number of ids. Writes
every repetition as JSON; the reference is measured again beside each of our figures, so that a busy machine hits both.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.metadata
import json
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers

from gridmill.demo import demo_model_folder
from gridmill.node.engines.base import Event, Served, Tokens
from gridmill.node.engines.native.engine import NativeEngine
from gridmill.node.engines.native.runner import Runner
from gridmill.wire.classes import ModelClass, TextFacts
from gridmill.wire.messages import Generate
from gridmill.wire.sampling import Sampling, choice_seed, pack_ids

SHAPES = {
    "random-1.5M": {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "vocab_size": 4096},
    "random-25M": {"hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8, "vocab_size": 8192},
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "engine.json")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--concurrency", default="1,4,16", help="comma-separated")
    parser.add_argument("--models", default="demo,random-25M", help=f"of demo, {', '.join(SHAPES)}, or folders")
    parser.add_argument("--modes", default="normal,exact")
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--output-tokens", type=int, default=96)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="of torch; nodes run with 1 where they share cores")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    results = []
    with tempfile.TemporaryDirectory() as scratch:
        for name in arguments.models.split(","):
            label, folder = model_folder(name, Path(scratch))
            for mode in arguments.modes.split(","):
                if mode == "exact" and arguments.dtype != "float32":
                    print(f"{label}: exact mode computes in float32 alone, left out", file=sys.stderr)
                    continue
                results += measure(label, folder, mode, arguments)
    document = {
        "what": "tokens per second: NativeEngine.run at a concurrency, transformers generate one request at a time",
        "device": device_name(arguments.device),
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers", "gridmill")},
        "python": platform.python_version(),
        "settings": {key: str(value) for key, value in vars(arguments).items() if key != "out"},
        "results": results,
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(document, indent=1) + "\n")
    return 0


def model_folder(name: str, scratch: Path) -> tuple[str, Path]:
    """(label, folder); random models are built on the spot, and stand in for a demo model that is not there."""
    if name == "demo":
        if (demo_model_folder() / "config.json").is_file():
            return "demo", demo_model_folder()
        name = "random-1.5M"
    if name not in SHAPES:
        return Path(name).name, Path(name)
    folder = scratch / name
    shape = SHAPES[name]
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        **shape,
        intermediate_size=shape["hidden_size"] * 43 // 16,
        num_key_value_heads=shape["num_attention_heads"] // 2,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return name, folder


def measure(label: str, folder: Path, mode: str, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    reference = Reference(folder, arguments)
    concurrencies = [int(part) for part in arguments.concurrency.split(",")]
    engine = start_engine(folder, label, mode == "exact", max(concurrencies), arguments)
    results = []

    async def body() -> None:
        number = 0
        await ours(engine, 2, number, arguments, tokens=8)  # warm
        reference.run(tokens=8)
        for concurrency in concurrencies:
            theirs_each, ours_each = [], []
            for _ in range(arguments.repeats):
                number += 1
                theirs_each.append(reference.run(arguments.output_tokens))
                ours_each.append(await ours(engine, concurrency, number, arguments, arguments.output_tokens))
            median, base = statistics.median(ours_each), statistics.median(theirs_each)
            results.append(
                {
                    "model": label,
                    "parameters": reference.parameters,
                    "mode": mode,
                    "arithmetic": engine.served.model_class.arithmetic,
                    "concurrency": concurrency,
                    "tokens_per_second": ours_each,
                    "tokens_per_second_median": median,
                    "generate_tokens_per_second": theirs_each,
                    "generate_tokens_per_second_median": base,
                    "ratio": median / base,
                }
            )
            print(
                f"{label:12} {mode:7} concurrency {concurrency:3}: {median:9.1f} tokens/s, "
                f"generate one at a time {base:8.1f}, ratio {median / base:6.2f}",
                flush=True,
            )
        await engine.close()

    asyncio.run(body())
    return results


class Reference:
    """transformers as one would use it: sdpa attention, its own cache, sampling on."""

    def __init__(self, folder: Path, arguments: argparse.Namespace) -> None:
        dtype = getattr(torch, arguments.dtype)
        self._model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(arguments.device).eval()
        self.parameters = sum(parameter.numel() for parameter in self._model.parameters())
        self._device = arguments.device
        self._prompt_tokens = arguments.prompt_tokens

    def run(self, tokens: int) -> float:
        """Tokens per second of one request."""
        ids = torch.tensor([prompt_ids(0, self._prompt_tokens, self._model.config.vocab_size)], device=self._device)
        options = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "pad_token_id": 0}
        start = time.perf_counter()
        with torch.inference_mode():
            out = self._model.generate(
                ids, attention_mask=torch.ones_like(ids), min_new_tokens=tokens, max_new_tokens=tokens, **options
            )
        assert out.tolist()[0][self._prompt_tokens :]  # .tolist() waits for the device
        return tokens / (time.perf_counter() - start)


def start_engine(folder: Path, label: str, exact: bool, slots: int, arguments: argparse.Namespace) -> NativeEngine:
    dtype = "auto" if exact else arguments.dtype
    runner = Runner(folder, dtype=dtype, device=arguments.device, exact=exact, kv_bytes=256 << 20)
    model_class = ModelClass(
        weights=(),
        arithmetic=runner.arithmetic,
        kv_dtype=str(runner.dtype).removeprefix("torch."),
        sampler_version=1,
        tokenizer_sha256="",
        text_facts_sha256="",
    )
    facts = TextFacts(
        chat_template=None,
        special_tokens={},
        eos_token_ids=(),
        context_tokens=arguments.prompt_tokens + arguments.output_tokens,
        vocab_size=runner.vocab_size,
    )
    return NativeEngine(Served(label, model_class, facts, {}), runner, slots=slots)


async def ours(
    engine: NativeEngine, concurrency: int, number: int, arguments: argparse.Namespace, tokens: int
) -> float:
    """Tokens per second of `concurrency` requests that start together, first byte to last, prompts included."""
    facts = engine.served.facts
    received = 0

    async def emit(event: Event) -> None:
        nonlocal received
        assert not hasattr(event, "code"), event
        if isinstance(event, Tokens):
            received += len(event.ids)

    works = []
    for index in range(concurrency):
        seed = choice_seed(bytes(32), 1000 * number + index)
        sampling = Sampling(seed=seed, max_tokens=tokens, temperature=1.0, ignore_eos=True)
        prompt = prompt_ids(1000 * number + index, arguments.prompt_tokens, facts.vocab_size)
        works.append(Generate(f"bench-{index}", engine.served.model_class.class_id, pack_ids(prompt), sampling))
    start = time.perf_counter()
    await asyncio.gather(*(engine.run(work, emit) for work in works))
    assert received == concurrency * tokens
    return received / (time.perf_counter() - start)


def prompt_ids(number: int, count: int, vocab_size: int) -> list[int]:
    return [(7919 * number + 31 * position + 1) % vocab_size for position in range(count)]


def device_name(device: str) -> str:
    if device.startswith("cuda"):
        return str(torch.cuda.get_device_name(device))
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return f"{name or platform.processor() or platform.machine()}, torch threads {torch.get_num_threads()}"


if __name__ == "__main__":
    raise SystemExit(main())
