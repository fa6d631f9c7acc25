"""64 streams at once over one node, each with the ids it has alone, and nothing left behind."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
from programs import Place, Stream, place, until

STREAMS = 64
TOKENS = 200


@pytest.fixture
def here(tmp_path: Path) -> Iterator[Place]:
    with place(tmp_path) as made:
        yield made


def random_model(folder: Path) -> Path:
    """A tiny Llama with random weights and the demo's tokenizer: its ids say something about arithmetic alone."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from gridmill.demo import demo_model_folder

    demo = demo_model_folder()
    vocab_size = json.loads((demo / "config.json").read_text())["vocab_size"]
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((demo / name).read_bytes())
    return folder


def ask(base_url: str, key: str, model: str, number: int) -> list[list[Any]]:
    """One stream's ids, as far as the API shows them: each token's text and bytes, and its logprob."""
    stream = Stream(
        base_url,
        key,
        model=model,
        prompt=list(range(10, 10 + 5 + number % 23)),
        max_tokens=TOKENS,
        temperature=1,
        seed=number,
        ignore_eos=True,
        logprobs=1,
        stream_options={"include_usage": True},
        cache_salt=f"{number}-{threading.get_ident()}",
    )
    events = stream.events()
    stream.close()
    assert not [event for event in events if "error" in event], events[-1]
    assert events[-1]["usage"]["completion_tokens"] == TOKENS
    lists = [choice["logprobs"] for event in events for choice in event["choices"] if choice.get("logprobs")]
    return [
        [token, logprob]
        for part in lists
        for token, logprob in zip(part["tokens"], part["token_logprobs"], strict=True)
    ]


def test_64_streams_at_once_get_the_ids_they_get_alone_and_leave_nothing_behind(here: Place) -> None:
    model = random_model(here.folder / "random")
    network = here.network()
    node = here.node(network, "--model", str(model), "--exact", "--kv-memory", "64MiB")
    key = here.key()
    base_url, name = network.facts["base_url"], node.facts["model"]
    ask(base_url, key, name, 0)  # what is made once and kept is made now

    def held() -> tuple[int, int, int, int]:
        processes = [psutil.Process(network.process.pid), psutil.Process(node.process.pid)]
        descriptors, threads = [p.num_fds() for p in processes], [p.num_threads() for p in processes]
        return descriptors[0], descriptors[1], threads[0], threads[1]

    until(lambda: here.status()["works_running"] == 0)
    before = held()
    with ThreadPoolExecutor(STREAMS) as pool:
        together = list(pool.map(lambda number: ask(base_url, key, name, number), range(STREAMS)))
    assert len({json.dumps(ids) for ids in together}) == STREAMS
    for number in range(0, STREAMS, 4):
        alone = ask(base_url, key, name, number)
        assert alone == together[number], f"stream {number} differs"
        assert len(alone) > TOKENS * 0.9  # a few ids show no text of their own
    until(lambda: here.status()["works_running"] == 0)
    state = here.status()["nodes"][0]
    assert state["running"] == 0
    until(lambda: held()[:2] <= before[:2] and held()[2:] <= before[2:])
