"""The runner against plain transformers, against itself alone, against itself cut in three, on tiny random models."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import FAMILIES, save_tiny, tiny_model

from gridmill.node.engines.native.pool import ATTENTION, Recipe
from gridmill.node.engines.native.runner import Row, Runner
from gridmill.node.engines.native.slice import ModelUnsupported, load_slice, read_config

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


@pytest.mark.parametrize("recipe", ["chosen", "fixed"])
def test_exact_mode_holds_over_many_blocks_and_tiles(
    recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Contexts longer than several attention blocks, chunks longer than the largest tile, matrices worth packing."""
    save_tiny(tmp_path, "llama", **LONG)
    if recipe == "fixed":  # what a machine gets on which the lean recipe does not hold
        monkeypatch.setattr("gridmill.node.engines.native.runner.choose_recipe", lambda *_: Recipe.FIXED)
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


def test_what_other_sessions_left_in_memory_never_shows(folder_of: Any) -> None:
    """A page is used again without being wiped, and NaN times zero is NaN."""
    folder = folder_of("llama")[0]
    for exact in (False, True):
        clean, dirty = sessions(7), sessions(7)
        together(Runner(folder, kv_pages=64, dtype="float32", exact=exact), clean, PROMPT_LENGTHS)
        runner = Runner(folder, kv_pages=64, dtype="float32", exact=exact)
        for tensor in (*runner._pool.keys, *runner._pool.values):
            tensor.fill_(float("nan"))
        together(runner, dirty, PROMPT_LENGTHS)
        assert torch.equal(logits_of(clean), logits_of(dirty))


def test_a_middle_chunk_asks_for_no_logits(folder_of: Any) -> None:
    runner = Runner(folder_of("llama")[0], kv_pages=64)
    one, two = sessions(8)[:2]
    out = runner.forward([Row(0, one.pages, one.ids[:9]), Row(0, two.pages, two.ids[:17], logits=1)])
    assert out.shape == (1, 512) and out.dtype is torch.float32
    assert runner.forward([Row(9, one.pages, one.ids[9:12])]).shape == (0, 512)


def test_half_precision_errs_no_more_than_plain_transformers_does(folder_of: Any) -> None:
    folder, model = folder_of("llama")
    precise = sessions(9)
    together(Runner(folder, kv_pages=64), precise, PROMPT_LENGTHS)
    for dtype in (torch.bfloat16, torch.float16):
        runner = Runner(folder, kv_pages=64, dtype=str(dtype).removeprefix("torch."))
        rough = sessions(9)
        together(runner, rough, PROMPT_LENGTHS)
        assert (
            runner.arithmetic == str(dtype).removeprefix("torch.") and runner.kv_bytes_per_page == 16 * 2 * 6 * 2 * 32
        )
        plain = copy.deepcopy(model).to(dtype)
        with torch.inference_mode():
            expected = torch.cat([plain(input_ids=torch.tensor([session.ids])).logits[0].float() for session in rough])
        error = (logits_of(rough) - logits_of(precise)).square().mean().sqrt()
        allowed = (expected - logits_of(precise)).square().mean().sqrt()
        assert 0 < error < 1.2 * allowed


def test_memory_for_keys_and_values_is_counted_in_whole_pages(folder_of: Any) -> None:
    folder = folder_of("llama")[0]
    per_page = Runner(folder, kv_pages=1).kv_bytes_per_page
    assert Runner(folder, kv_bytes=per_page * 7 + per_page // 2).pages == 7
    with pytest.raises(ModelUnsupported, match="holds no page"):
        Runner(folder, kv_bytes=per_page - 1)


def test_dtype_auto_is_float32_for_a_small_model_on_a_cpu(tmp_path: Path) -> None:
    tiny_model("llama").to(torch.bfloat16).save_pretrained(tmp_path)
    assert Runner(tmp_path, kv_pages=4, device="cpu").dtype is torch.float32


@pytest.mark.parametrize(
    ("row", "match"),
    [
        (Row(0, [0], None, logits=1), "token ids"),
        (Row(0, [0], [], logits=0), "0 new tokens"),
        (Row(0, [0], [5], logits=2), "cannot give 2 logits"),
        (Row(0, [0], [512], logits=1), "outside 0:512"),
        (Row(0, [0], [-1], logits=1), "outside 0:512"),
        (Row(16, [0], [5], logits=1), "does not cover"),
        (Row(-1, [0], [5], logits=1), "does not cover"),
        (Row(0, [64], [5], logits=1), "outside 0:64"),
        (Row(0, [-1], [5], logits=1), "outside 0:64"),
        (Row(20, [3, 70, 4], [5], logits=1), "outside 0:64"),
    ],
)
def test_a_row_that_contradicts_itself_is_refused_by_name(row: Row, match: str, folder_of: Any) -> None:
    runner = Runner(folder_of("llama")[0], kv_pages=64)
    with pytest.raises(ValueError, match=match):
        runner.forward([row])


def test_a_later_stage_wants_hidden_states(folder_of: Any) -> None:
    stage = Runner(folder_of("llama")[0], layers=(2, 4), kv_pages=4)
    assert not stage.is_first and not stage.is_last and stage.num_layers_total == 6
    with pytest.raises(ValueError, match="hidden states"):
        stage.forward([Row(0, [0], [5])])
    with pytest.raises(ValueError, match="hidden states"):
        stage.forward([Row(0, [0], None, hidden=torch.zeros(3, 63))])
    assert stage.forward([Row(0, [0], None, hidden=torch.zeros(3, 64))]).shape == (3, 64)


def test_a_stage_holds_only_what_it_needs(folder_of: Any) -> None:
    folder, model = folder_of("llama")
    layer = sum(parameter.numel() for parameter in model.model.layers[0].parameters())
    table = model.lm_head.weight.numel()
    for layers, expected in (((2, 4), 2 * layer), ((0, 1), layer + table), ((5, 6), layer + table + 64)):
        part = load_slice(folder, config=read_config(folder), layers=layers, dtype=torch.float32, attention=ATTENTION)
        held = {id(p): p.numel() for m in (part.core, part.causal) for p in m.parameters()}
        assert sum(held.values()) == expected, layers


# ------------------------------------------------------------------ folders that cannot be served


def broken(folder: Path, edit: Callable[[dict[str, Any]], Any]) -> Path:
    """The config of a tiny Llama, edited."""
    config = json.loads((folder / "config.json").read_text())
    edit(config)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("edit", "match"),
    [
        (lambda c: c.update(model_type="no_such_model"), "does not know model type 'no_such_model'"),
        (lambda c: c.update(model_type=7), "does not know model type"),
        (lambda c: c.update(model_type="no_such_model", auto_map={"AutoConfig": "x.Y"}), "runs code of its own"),
        (lambda c: c.update(model_type="t5"), "encoder-decoder"),
        (lambda c: c.update(model_type="bert"), "lacks bert"),
        (lambda c: c.update(num_hidden_layers=7), "7 layers and the files hold 6"),
        (lambda c: c.update(num_hidden_layers=0), "num_hidden_layers"),
        (lambda c: c.update(num_hidden_layers=1 << 30), "num_hidden_layers"),
        (lambda c: c.update(hidden_size="64"), "cannot read"),
        (lambda c: c.update(hidden_size=128), "another shape"),
        (lambda c: c.update(vocab_size=513), "another shape"),
        (lambda c: c.update(head_dim=1 << 22), "do not belong together"),
        (lambda c: c.update(intermediate_size=1 << 40), "do not belong together|cannot build"),
        (lambda c: c.update(hidden_act="os.system"), "cannot build"),
        (lambda c: c.update(rms_norm_eps=float("nan")), "NaN or infinity"),
        (lambda c: c.update(quantization_config={"quant_method": "gptq"}), "quantised"),
    ],
)
def test_a_folder_that_cannot_be_served_is_one_sentence(edit: Any, match: str, tmp_path: Path) -> None:
    save_tiny(tmp_path, "llama")
    with pytest.raises(ModelUnsupported, match=match) as caught:
        Runner(broken(tmp_path, edit), kv_pages=4)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_damaged_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ModelUnsupported, match=r"no config\.json"):
        Runner(tmp_path)
    save_tiny(tmp_path, "llama")
    shard = sorted(tmp_path.glob("*.safetensors"))[2]
    whole = shard.read_bytes()
    for damage in (whole[:-100], b"\xff" * 200, b""):
        shard.write_bytes(damage)
        with pytest.raises(ModelUnsupported, match=shard.name):
            Runner(tmp_path, kv_pages=4)
    shard.unlink()
    with pytest.raises(ModelUnsupported, match="missing: download"):
        Runner(tmp_path, kv_pages=4)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"model.norm.weight": "../elsewhere.safetensors"}}))
    with pytest.raises(ModelUnsupported, match="elsewhere"):
        Runner(tmp_path, kv_pages=4)
    index.write_text('{"weight_map": [1, 2]}')
    with pytest.raises(ModelUnsupported, match="cannot be read"):
        Runner(tmp_path, kv_pages=4)
    (tmp_path / "config.json").write_text("[" * 100_000)
    with pytest.raises(ModelUnsupported, match=r"config\.json"):
        Runner(tmp_path, kv_pages=4)


def test_damaged_weights_show_at_load(tmp_path: Path) -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[3].mlp.up_proj.weight[5, 5] = float("nan")
    model.save_pretrained(tmp_path)
    with pytest.raises(ModelUnsupported, match="NaN or infinity"):
        Runner(tmp_path, kv_pages=4)


def test_exact_mode_refuses_what_it_cannot_keep(folder_of: Any) -> None:
    folder = folder_of("llama")[0]
    with pytest.raises(ModelUnsupported, match="exact mode computes in float32"):
        Runner(folder, exact=True, dtype="bfloat16")
    with pytest.raises(ValueError, match="multiple of 16"):
        Runner(folder, exact=True, page_tokens=8, kv_pages=4)
    assert Runner(folder, page_tokens=8, kv_pages=4).pages == 4
