"""The runner against plain transformers, against itself alone, against itself cut in three, on tiny random models."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import FAMILIES, save_tiny

from gridmill.node.engines.native.pool import Recipe
from gridmill.node.engines.native.runner import Row, Runner

QUICK = ("llama", "gemma3_text", "qwen3_moe", "deepseek_v3")
ALL = [pytest.param(name, marks=() if name in QUICK else pytest.mark.soak) for name in FAMILIES]
CUTS = ((0, 2), (2, 3), (3, 6))
PROMPT_LENGTHS = (5, 17, 30, 41)
STEPS = 12


@dataclass
class Session:
    """A sequence whose tokens were chosen beforehand, and how far it has been computed."""

    ids: list[int]
    pages: list[int]
    done: int = 0
    logits: list[torch.Tensor] = field(default_factory=list)

    def row(self, count: int) -> Row:
        return Row(self.done, self.pages, self.ids[self.done : self.done + count], logits=count)


class Chain:
    """Three runners one after the other, seen as one."""

    def __init__(self, stages: list[Runner]) -> None:
        self.stages = stages

    def forward(self, rows: list[Row]) -> torch.Tensor:
        out = self.stages[0].forward(rows)
        for stage in self.stages[1:]:
            parts = out.split([len(row.ids or ()) for row in rows])
            out = stage.forward(
                [Row(row.position, row.pages, None, part, row.logits) for row, part in zip(rows, parts, strict=True)]
            )
        return out


def sessions(
    seed: int, *, lengths: tuple[int, ...] = PROMPT_LENGTHS, vocab: int = 500, pages: int = 64
) -> list[Session]:
    """Sessions with scattered page tables, but for the last, whose pages are neighbours."""
    generator = random.Random(seed)
    free = list(range(pages - 8))
    generator.shuffle(free)
    tables = [[free.pop() for _ in range(6)] for _ in lengths[1:]] + [list(range(pages - 8, pages))]
    return [
        Session([generator.randrange(3, vocab) for _ in range(length + STEPS)], table)
        for length, table in zip(lengths, tables, strict=True)
    ]


def advance(runner: Any, moves: list[tuple[Session, int]]) -> None:
    """One forward pass: each session computes its next `count` tokens and keeps all their logits."""
    out = runner.forward([session.row(count) for session, count in moves])
    for (session, count), logits in zip(moves, out.split([count for _, count in moves]), strict=True):
        session.logits.append(logits.clone())
        session.done += count


def together(runner: Any, batch: list[Session], prompts: tuple[int, ...]) -> None:
    """All prompts in one pass, then every session one token a step."""
    advance(runner, list(zip(batch, prompts, strict=True)))
    for _ in range(STEPS):
        advance(runner, [(session, 1) for session in batch])


def alone(runner: Any, batch: list[Session], prompts: tuple[int, ...]) -> None:
    for session, prompt in zip(batch, prompts, strict=True):
        together(runner, [session], (prompt,))


def at_random(runner: Any, batch: list[Session], seed: int) -> None:
    """Sessions join and leave at random, in chunks of random size, as under a scheduler."""
    generator = random.Random(seed)
    while open_sessions := [session for session in batch if session.done < len(session.ids)]:
        chosen = generator.sample(open_sessions, generator.randint(1, len(open_sessions)))
        left = [len(session.ids) - session.done for session in chosen]
        advance(
            runner, [(s, min(n, generator.choice((1, 1, 1, 2, 7, 16, 19)))) for s, n in zip(chosen, left, strict=True)]
        )


def logits_of(batch: list[Session]) -> torch.Tensor:
    return torch.cat([torch.cat(session.logits) for session in batch])


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], tuple[Path, Any]]]:
    made: dict[str, tuple[Path, Any]] = {}

    def make(family: str) -> tuple[Path, Any]:
        if family not in made:
            folder = tmp_path_factory.mktemp(family)
            made[family] = (folder, save_tiny(folder, family))
        return made[family]

    yield make


@pytest.mark.parametrize("family", ALL)
def test_a_ragged_batch_gives_what_plain_transformers_gives(family: str, folder_of: Any) -> None:
    folder, model = folder_of(family)
    runner = Runner(folder, kv_pages=64, dtype="float32")
    batch = sessions(1)
    together(runner, batch, PROMPT_LENGTHS)
    with torch.inference_mode():
        expected = torch.cat([model(input_ids=torch.tensor([session.ids])).logits[0] for session in batch])
    got = logits_of(batch)
    assert (got - expected).abs().max() < 1e-4
    assert torch.equal(got.argmax(-1), expected.argmax(-1))
    assert expected.std() > 0.01  # the model says something at all


@pytest.mark.parametrize("family", ALL)
def test_a_batch_gives_what_each_row_gives_alone(family: str, folder_of: Any) -> None:
    runner = Runner(folder_of(family)[0], kv_pages=64, dtype="float32")
    one, many, mixed = sessions(2), sessions(2), sessions(2)
    alone(runner, one, PROMPT_LENGTHS)
    together(runner, many, PROMPT_LENGTHS)
    at_random(runner, mixed, seed=3)
    for other in (many, mixed):
        assert (logits_of(one) - logits_of(other)).abs().max() < 1e-4
        assert torch.equal(logits_of(one).argmax(-1), logits_of(other).argmax(-1))


@pytest.mark.parametrize("family", ALL)
def test_three_ranges_give_what_the_whole_gives(family: str, folder_of: Any) -> None:
    folder = folder_of(family)[0]
    whole, cut = sessions(4), sessions(4)
    together(Runner(folder, kv_pages=64, dtype="float32"), whole, PROMPT_LENGTHS)
    chain = Chain([Runner(folder, layers=layers, kv_pages=64, dtype="float32") for layers in CUTS])
    together(chain, cut, PROMPT_LENGTHS)
    assert torch.equal(logits_of(whole), logits_of(cut))


@pytest.mark.parametrize("family", ALL)
def test_exact_mode_gives_the_same_bits_in_any_company(family: str, folder_of: Any) -> None:
    runner = Runner(folder_of(family)[0], kv_pages=128, exact=True)
    assert runner.arithmetic == "float32-exact" and runner.exact_holds
    one = sessions(5)
    alone(runner, one, (1, 1, 1, 1))  # the first 13 tokens, one by one
    for session in one:
        while session.done < len(session.ids):
            advance(runner, [(session, 1)])
    many = sessions(5)
    together(runner, many, PROMPT_LENGTHS)
    assert torch.equal(logits_of(one), logits_of(many))
    for seed in range(4):
        company = sessions(5)
        moved = random.Random(seed).sample([session.pages for session in company], len(company))
        for session, pages in zip(company, moved, strict=True):
            session.pages = pages
        at_random(runner, [*company, *strangers(seed)], seed)
        assert torch.equal(logits_of(one), logits_of(company))


def strangers(seed: int) -> list[Session]:
    """Other people's sessions, whose pages lie behind those of `sessions`."""
    generator = random.Random(100 + seed)
    count = generator.randint(1, 9)
    return [
        Session([generator.randrange(3, 500) for _ in range(generator.randint(1, 60))], list(range(at, at + 4)))
        for at in range(64, 64 + 4 * count, 4)
    ]


LONG = {
    "hidden_size": 320,
    "intermediate_size": 864,
    "num_hidden_layers": 3,
    "num_attention_heads": 10,
    "num_key_value_heads": 5,
    "max_position_embeddings": 1024,
}


@pytest.mark.parametrize("recipe", [Recipe.LEAN, Recipe.FIXED])
def test_exact_mode_holds_over_many_blocks_and_tiles(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Contexts longer than several attention blocks, chunks longer than the largest tile, matrices worth packing."""
    save_tiny(tmp_path, "llama", **LONG)
    monkeypatch.setattr("gridmill.node.engines.native.runner.choose_recipe", lambda *_: recipe)
    runner = Runner(tmp_path, kv_pages=200, exact=True)
    assert runner.exact_holds
    generator = random.Random(6)
    ids = [[generator.randrange(3, 500) for _ in range(length)] for length in (30, 300, 420)]

    def fresh() -> list[Session]:
        pages = generator.sample(range(200), 90)
        return [Session(list(tokens), pages[at * 30 : at * 30 + 30]) for at, tokens in enumerate(ids)]

    one = fresh()
    for session in one:
        session.pages = list(range(30))
        advance(runner, [(session, len(session.ids) - 20)])
        while session.done < len(session.ids):
            advance(runner, [(session, 1)])
    for _ in range(3):
        many = fresh()
        while open_sessions := [session for session in many if session.done < len(session.ids)]:
            moves = [(s, min(len(s.ids) - s.done, generator.choice((1, 3, 64, 130, 200)))) for s in open_sessions]
            advance(runner, moves)
        assert torch.equal(logits_of(one), logits_of(many))
