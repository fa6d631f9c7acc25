"""Running `gridmill up` programs that whole test files share: starting one takes seconds, a request milliseconds."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx2
import openai
import pytest
from programs import Program
from tokenizers import Tokenizer

from gridmill.demo import demo_model_folder


class Up:
    """A running `gridmill up`, with clients for it. Tokenizer and model are the demo's whatever engine runs."""

    def __init__(self, program: Program) -> None:
        self.base_url: str = program.facts["base_url"]
        self.api_key: str = program.facts["api_key"]
        self.model: str = program.facts["model"]
        self.node_id: str = program.facts["node_id"]
        self.client = openai.OpenAI(base_url=self.base_url, api_key=self.api_key, max_retries=0, timeout=60)
        self.http = httpx2.Client(headers={"authorization": f"Bearer {self.api_key}"}, timeout=60)
        self.tokenizer = Tokenizer.from_file(str(demo_model_folder() / "tokenizer.json"))

    def async_client(self) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=self.base_url, api_key=self.api_key, max_retries=0, timeout=60)

    def works_running(self) -> float:
        metrics = self.http.get(self.base_url.removesuffix("/v1") + "/metrics").text
        return float(
            next(line.split()[1] for line in metrics.splitlines() if line.startswith("gridmill_works_running "))
        )

    def close(self) -> None:
        self.client.close()
        self.http.close()


def running(folder: Path, *arguments: str) -> Iterator[Up]:
    program = Program("up", "--port", "0", "--data", folder / "data", *arguments, log=folder / "up.log")
    try:
        up = Up(program.ready())
        try:
            yield up
        finally:
            up.close()
    finally:
        program.close()


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    """The toy model on the native engine, as a newcomer gets it."""
    yield from running(tmp_path_factory.mktemp("demo"))


@pytest.fixture(scope="module")
def echo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    """Ids that are a hash of prompt, seed and previous ids: any slip in either shows."""
    yield from running(tmp_path_factory.mktemp("echo"), "--engine", "echo")


@pytest.fixture(scope="module")
def slow_echo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    """Twenty tokens a second, for everything that happens in mid-stream."""
    yield from running(tmp_path_factory.mktemp("slow"), "--engine", "echo", "--echo-tokens-per-second", "20")
