"""A model becomes a class: from a folder, from a hub on a real socket, and not at all where that would be wrong."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from gridmill.node import hub
from gridmill.node.models import ModelError, _name_of, resolve, settled_dtype
from gridmill.wire.classes import parse_facts

COMMIT = "a" * 40
WEIGHTS = bytes(range(256)) * 4096  # 1 MiB that stands for safetensors; nothing here loads it


def text_files(**config: Any) -> dict[str, bytes]:
    vocabulary = {token: number for number, token in enumerate(["<s>", "</s>", "a", "b", "c"])}
    files: dict[str, Any] = {
        "config.json": {"vocab_size": 5, "max_position_embeddings": 128, "eos_token_id": 1, "dtype": "bfloat16"}
        | config,
        "tokenizer.json": {
            "model": {"type": "BPE", "vocab": vocabulary, "merges": []},
            "added_tokens": [{"id": 0, "content": "<s>"}, {"id": 1, "content": "</s>"}],
        },
        "tokenizer_config.json": {
            "bos_token": "<s>",
            "eos_token": {"content": "</s>"},
            "chat_template": "{{ messages }}",
        },
    }
    return {name: json.dumps(value).encode() for name, value in files.items()}


def whole_model(**config: Any) -> dict[str, bytes]:
    return text_files(**config) | {"model.safetensors": WEIGHTS}


def written(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def found(model: str | Path, data: Path, **more: Any) -> Any:
    return asyncio.run(resolve(str(model), data=data, **more))


def refusal(model: str | Path, data: Path, **more: Any) -> str:
    with pytest.raises(ModelError) as refused:
        found(model, data, **more)
    return str(refused.value)


# ---------------------------------------------------------------- a folder


def test_a_folder_becomes_a_class_whose_every_digest_can_be_checked(tmp_path: Path) -> None:
    folder = written(tmp_path / "tiny-model", whole_model())
    local = found(folder, tmp_path / "data")
    assert local.name == "tiny-model"
    assert [file.name for file in local.model_class.weights] == ["config.json", "model.safetensors"]
    assert local.model_class.weights[1].sha256 == hashlib.sha256(WEIGHTS).hexdigest()
    assert (local.model_class.arithmetic, local.model_class.kv_dtype) == ("float32", "float32")
    facts = parse_facts(local.files[local.model_class.text_facts_sha256])
    assert facts == local.facts
    assert (facts.vocab_size, facts.context_tokens, facts.eos_token_ids, facts.toy) == (5, 128, (1,), False)
    assert facts.special_tokens == {"bos_token": "<s>", "eos_token": "</s>"}
    assert facts.chat_template == "{{ messages }}"
    tokenizer = local.files[local.model_class.tokenizer_sha256]
    assert tokenizer == (folder / "tokenizer.json").read_bytes()


def test_whatever_decides_the_ids_changes_the_class_and_nothing_else_does(tmp_path: Path) -> None:
    folder = written(tmp_path / "tiny", whole_model())
    data = tmp_path / "data"
    first = found(folder, data).model_class.class_id
    assert found(folder, tmp_path / "other", name="any/name").model_class.class_id == first
    written(folder, {"README.md": b"words", "consolidated.safetensors": b"unused"})
    assert found(folder, data).model_class.class_id == first
    ids = {
        first,
        found(folder, data, dtype="bfloat16").model_class.class_id,
        found(folder, data, exact=True).model_class.class_id,
        found(folder, data, context_tokens=64).model_class.class_id,
    }
    written(folder, {"chat_template.jinja": b"{{ other }}"})
    local = found(folder, data)
    assert local.facts.chat_template == "{{ other }}"
    ids.add(local.model_class.class_id)
    written(folder, {"model.safetensors": WEIGHTS[1:] + b"x"})
    ids.add(found(folder, data).model_class.class_id)
    assert len(ids) == 6


def test_digests_are_remembered_until_a_file_changes(tmp_path: Path) -> None:
    folder = written(tmp_path / "tiny", whole_model())
    data = tmp_path / "data"
    read: list[int] = []
    found(folder, data, progress=lambda what, done, total: read.append(done))
    assert read
    read.clear()
    local = found(folder, data, progress=lambda what, done, total: read.append(done))
    assert not read
    weights = folder / "model.safetensors"
    weights.write_bytes(WEIGHTS[::-1])
    os.utime(weights, ns=(1, 1))
    assert found(folder, data).model_class != local.model_class


def test_shards_are_those_that_the_index_names(tmp_path: Path) -> None:
    index = {"weight_map": {"x": "part-2.safetensors", "y": "part-1.safetensors", "z": "part-1.safetensors"}}
    files = text_files() | {
        "model.safetensors.index.json": json.dumps(index).encode(),
        "part-1.safetensors": b"1",
        "part-2.safetensors": b"2",
        "stray.safetensors": b"3",
    }
    local = found(written(tmp_path / "m", files), tmp_path / "data")
    assert [file.name for file in local.model_class.weights] == [
        "config.json",
        "model.safetensors.index.json",
        "part-1.safetensors",
        "part-2.safetensors",
    ]
    (tmp_path / "m" / "part-2.safetensors").unlink()
    assert "lacks part-2.safetensors" in refusal(tmp_path / "m", tmp_path / "data")


def index_of(name: str) -> dict[str, bytes]:
    return {"model.safetensors.index.json": json.dumps({"weight_map": {"x": name}}).encode()}


@pytest.mark.parametrize(
    ("files", "sentence"),
    [
        (text_files() | {"pytorch_model.bin": b"x"}, "can run any code when it is loaded"),
        (text_files() | {"model.gguf": b"x"}, "only as GGUF"),
        (text_files() | {"adapter_model.safetensors": b"x"}, "adapter without its base model"),
        (text_files(), "holds no weights"),
        ({"model.safetensors": b"x"}, "has no config.json"),
        ({"model.safetensors": b"x", "config.json": b"{"}, "is not valid JSON"),
        ({"model.safetensors": b"x", "config.json": b"[]"}, "must hold a JSON object"),
        ({"model.safetensors": b"x", "config.json": b'{"vocab_size": 5}'}, "has no tokenizer"),
        (whole_model() | {"tokenizer.json": b"{}"}, "holds no vocabulary"),
        (whole_model(vocab_size=None), "does not state vocab_size"),
        (whole_model(vocab_size=1 << 40), "absurd context length or vocabulary size"),
        (whole_model(max_position_embeddings=None), "give --context-tokens"),
        (text_files() | index_of("../../secret.safetensors"), "no plain *.safetensors file"),
        (text_files() | index_of("/etc/passwd"), "no plain *.safetensors file"),
        (text_files() | index_of("weights.bin"), "no plain *.safetensors file"),
        (text_files() | {"model.safetensors.index.json": b"{}"}, "holds no weight_map"),
    ],
)
def test_a_folder_that_cannot_be_served_says_why(tmp_path: Path, files: dict[str, bytes], sentence: str) -> None:
    assert sentence in refusal(written(tmp_path / "m", files), tmp_path / "data")


def test_a_path_that_is_no_folder_says_what_is_wanted(tmp_path: Path) -> None:
    file = tmp_path / "weights.gguf"
    file.write_bytes(b"x")
    assert "takes the folder" in refusal(file, tmp_path)
    assert "does not exist" in refusal(tmp_path / "absent", tmp_path)
    assert "neither a folder here nor a repo id" in refusal("no such model", tmp_path)
    assert "--revision belongs to" in refusal(written(tmp_path / "m", whole_model()), tmp_path, revision="main")


def test_context_can_be_capped_and_not_stretched(tmp_path: Path) -> None:
    folder = written(tmp_path / "m", whole_model())
    assert found(folder, tmp_path, context_tokens=100).facts.context_tokens == 100
    assert "more than m was made for, 128" in refusal(folder, tmp_path, context_tokens=129)


def test_end_ids_come_from_the_generation_config_and_the_tokenizer(tmp_path: Path) -> None:
    files = whole_model() | {"generation_config.json": b'{"eos_token_id": [4, 3, 99]}'}
    local = found(written(tmp_path / "m", files), tmp_path)
    assert local.facts.eos_token_ids == (1, 3, 4)
    assert "generation_config.json" in [file.name for file in local.model_class.weights]


def test_of_several_named_templates_the_default_is_taken(tmp_path: Path) -> None:
    templates = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
    files = whole_model() | {"tokenizer_config.json": json.dumps({"chat_template": templates}).encode()}
    assert found(written(tmp_path / "m", files), tmp_path).facts.chat_template == "D"


def test_a_model_that_also_sees_is_read_from_its_text_config(tmp_path: Path) -> None:
    config = {"text_config": {"vocab_size": 5, "max_position_embeddings": 32, "eos_token_id": 2}}
    files = whole_model() | {"config.json": json.dumps(config).encode()}
    facts = found(written(tmp_path / "m", files), tmp_path).facts
    assert (facts.vocab_size, facts.context_tokens, facts.eos_token_ids) == (5, 32, (1, 2))


def test_a_model_with_only_an_older_tokenizer_gets_a_converted_one(tmp_path: Path) -> None:
    files = whole_model(model_type="gpt2")
    del files["tokenizer.json"]
    vocabulary = {"<s>": 0, "</s>": 1, "a": 2, "b": 3, "ab": 4}
    files |= {"vocab.json": json.dumps(vocabulary).encode(), "merges.txt": b"#version: 0.2\na b\n"}
    files["tokenizer_config.json"] = json.dumps({"tokenizer_class": "GPT2Tokenizer", "eos_token": "</s>"}).encode()
    folder = written(tmp_path / "old", files)
    local = found(folder, tmp_path / "data")
    assert "converted" in local.notes[0]
    assert json.loads(local.files[local.model_class.tokenizer_sha256])["model"]["vocab"]["ab"] == 4
    assert found(folder, tmp_path / "data").model_class == local.model_class
    assert not (folder / "tokenizer.json").exists()


@pytest.mark.parametrize(
    ("asked", "exact", "device", "saved", "settled"),
    [
        ("auto", False, "cpu", "bfloat16", "float32"),
        ("auto", False, "cuda", "bfloat16", "bfloat16"),
        ("auto", False, "cuda", "torch.float16", "float16"),
        ("auto", False, "cuda", "float8", "float32"),
        ("auto", True, "cuda", "bfloat16", "float32"),
        ("bfloat16", False, "cpu", "float32", "bfloat16"),
    ],
)
def test_auto_dtype_is_settled_by_device_and_model(
    asked: Any, exact: bool, device: str, saved: str, settled: str
) -> None:
    assert settled_dtype(asked, exact=exact, device=lambda: device, config={"torch_dtype": saved}) == settled


def test_exact_mode_computes_in_nothing_but_float32() -> None:
    with pytest.raises(ModelError, match="--exact computes in float32"):
        settled_dtype("bfloat16", exact=True, device=lambda: "cpu", config={})


def test_a_snapshot_of_the_hugging_face_cache_keeps_its_repo_name(tmp_path: Path) -> None:
    assert _name_of(tmp_path / "models--owner--some-model" / "snapshots" / COMMIT) == "owner/some-model"
    assert _name_of(tmp_path / "some-model") == "some-model"


# ---------------------------------------------------------------- echo


def test_echo_needs_a_tokenizer_and_nothing_else(tmp_path: Path) -> None:
    files = {"tokenizer.json": text_files()["tokenizer.json"]}
    local = found(written(tmp_path / "m", files), tmp_path / "data", engine="echo")
    assert (local.model_class.weights, local.model_class.arithmetic, local.model_class.kv_dtype) == ((), "echo", "none")
    assert (local.facts.vocab_size, local.facts.context_tokens) == (5, 8192)


def test_echo_serves_an_unknown_name_with_the_demos_tokenizer_and_asks_nobody(tmp_path: Path) -> None:
    local = found("any/name-at-all", tmp_path, engine="echo", hub_url="http://127.0.0.1:1")
    demo = found("gridmill/demo", tmp_path, engine="echo")
    assert local.name == "any/name-at-all"
    assert local.model_class == demo.model_class
    assert "demo's tokenizer" in local.notes[0] and not demo.notes
    assert found("mock", tmp_path, engine="echo").name == "mock"


# ---------------------------------------------------------------- the hub, on a real socket


class FakeHub:
    """A hub with one repo, `owner/tiny`. `faults` are functions that may answer a file request in its place."""

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files = files
        self.requests: list[tuple[str, str]] = []
        self.faults: list[Callable[[web.Request, str], Awaitable[web.StreamResponse | None]]] = []
        self.extra_siblings: list[dict[str, Any]] = []
        self.url = ""

    async def listing(self, request: web.Request) -> web.StreamResponse:
        self.requests.append(("listing", request.match_info["revision"]))
        if request.match_info["repo"] != "tiny":
            return web.Response(status=404)
        siblings = []
        for name, content in self.files.items():
            entry: dict[str, Any] = {"rfilename": name, "size": len(content)}
            if name.endswith(".safetensors"):
                entry["lfs"] = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content)}
                entry["blobId"] = "0" * 40
            else:
                entry["blobId"] = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
            siblings.append(entry)
        return web.json_response({"sha": COMMIT, "siblings": siblings + self.extra_siblings})

    async def file(self, request: web.Request) -> web.StreamResponse:
        name = request.match_info["name"]
        self.requests.append((name, request.headers.get("Range", "")))
        assert request.match_info["commit"] == COMMIT
        for fault in list(self.faults):
            answer = await fault(request, name)
            if answer is not None:
                return answer
        if name.endswith(".safetensors"):  # as the real one does: large files live elsewhere
            raise web.HTTPFound(f"{self.url}/cdn/{name}")
        return web.Response(body=self.files[name])

    async def cdn(self, request: web.Request) -> web.StreamResponse:
        content = self.files[request.match_info["name"]]
        wanted = request.http_range
        start = wanted.start or 0
        if start == 0:
            return web.Response(body=content)
        headers = {"Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"}
        return web.Response(status=206, body=content[start:], headers=headers)

    async def __aenter__(self) -> FakeHub:
        app = web.Application()
        app.router.add_get("/api/models/owner/{repo}/revision/{revision}", self.listing)
        app.router.add_get("/owner/tiny/resolve/{commit}/{name:.+}", self.file)
        app.router.add_get("/cdn/{name:.+}", self.cdn)
        self.runner = web.AppRunner(app)
        await self.runner.setup()
        site = web.TCPSite(self.runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{self.runner.addresses[0][1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.runner.cleanup()


@pytest.fixture(autouse=True)
def quick_retries(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(hub, "BACKOFF_SECONDS", 0.001)
    yield


def with_hub(files: dict[str, bytes], body: Callable[[FakeHub], Awaitable[None]]) -> None:
    async def run() -> None:
        async with FakeHub(files) as fake:
            await body(fake)

    asyncio.run(run())


def test_a_repo_gives_the_same_class_as_the_folder_and_then_needs_no_hub(tmp_path: Path) -> None:
    async def body(fake: FakeHub) -> None:
        progress: list[tuple[str, int, int]] = []
        local = await resolve(
            "owner/tiny", data=tmp_path / "d", hub_url=fake.url, progress=lambda *said: progress.append(said)
        )
        folder = written(tmp_path / "same", whole_model())
        assert local.model_class == (await resolve(str(folder), data=tmp_path / "d")).model_class
        assert local.name == "owner/tiny"
        assert ("README.md", "") not in fake.requests
        assert any(done == total for what, done, total in progress if what.startswith("downloading"))
        assert not list((tmp_path / "d").rglob("*.part"))
        fake.requests.clear()
        for revision in (None, "main", COMMIT):
            again = await resolve("owner/tiny", data=tmp_path / "d", hub_url="http://127.0.0.1:1", revision=revision)
            assert again.model_class == local.model_class
        assert not fake.requests

    with_hub(whole_model() | {"README.md": b"words", "pytorch_model.bin": b"pickle"}, body)


def test_shards_of_a_repo_come_after_its_index(tmp_path: Path) -> None:
    files = text_files() | index_of("part-1.safetensors") | {"part-1.safetensors": WEIGHTS, "x.safetensors": b"-"}

    async def body(fake: FakeHub) -> None:
        local = await resolve("owner/tiny", data=tmp_path, hub_url=fake.url)
        assert "part-1.safetensors" in [file.name for file in local.model_class.weights]
        assert "x.safetensors" not in [name for name, _ in fake.requests]
        fake.files |= index_of("absent.safetensors")
        with pytest.raises(ModelError, match=r"names the file 'absent\.safetensors' but does not hold it"):
            await resolve("owner/tiny", data=tmp_path / "other", hub_url=fake.url)

    with_hub(files, body)


def cut_after(count: int, times: int) -> Callable[[web.Request, str], Awaitable[web.StreamResponse | None]]:
    """A server that promises the rest of the weights, sends `count` bytes of it and hangs up."""
    left = [times]

    async def fault(request: web.Request, name: str) -> web.StreamResponse | None:
        if name != "model.safetensors" or not left[0]:
            return None
        left[0] -= 1
        start = request.http_range.start or 0
        response = web.StreamResponse(status=206 if start else 200)
        response.content_length = len(WEIGHTS) - start
        if start:
            response.headers["Content-Range"] = f"bytes {start}-{len(WEIGHTS) - 1}/{len(WEIGHTS)}"
        await response.prepare(request)
        await response.write(WEIGHTS[start : start + count])
        assert request.transport is not None
        request.transport.close()
        return response

    return fault


def test_a_download_that_is_cut_goes_on_where_it_was(tmp_path: Path) -> None:
    async def body(fake: FakeHub) -> None:
        fake.faults.append(cut_after(100_000, times=6))  # more cuts than attempts: each brought something
        local = await resolve("owner/tiny", data=tmp_path, hub_url=fake.url)
        assert local.model_class.weights[1].sha256 == hashlib.sha256(WEIGHTS).hexdigest()
        ranges = [wanted for name, wanted in fake.requests if name == "model.safetensors"]
        starts = [int(wanted[6:-1]) for wanted in ranges[1:]]
        assert len(ranges) == 7 and starts == sorted(starts) and starts[0] > 0

    with_hub(whole_model(), body)


def test_a_download_goes_on_after_the_program_was_killed(tmp_path: Path) -> None:
    async def body(fake: FakeHub) -> None:
        folder = tmp_path / "models" / "owner--tiny" / COMMIT
        written(folder, {"model.safetensors.part": WEIGHTS[:300_000]})
        await resolve("owner/tiny", data=tmp_path, hub_url=fake.url)
        assert ("model.safetensors", "bytes=300000-") in fake.requests

    with_hub(whole_model(), body)


def test_a_part_that_was_wrong_is_thrown_away_and_fetched_whole(tmp_path: Path) -> None:
    async def body(fake: FakeHub) -> None:
        folder = tmp_path / "models" / "owner--tiny" / COMMIT
        written(folder, {"model.safetensors.part": b"\0" * 300_000})
        await resolve("owner/tiny", data=tmp_path, hub_url=fake.url)
        assert (folder / "model.safetensors").read_bytes() == WEIGHTS
        written(tmp_path / "models" / "owner--tiny" / COMMIT, {"model.safetensors.part": WEIGHTS + b"more"})
        (folder / "model.safetensors").unlink()
        await resolve("owner/tiny", data=tmp_path, hub_url=fake.url)
        assert (folder / "model.safetensors").read_bytes() == WEIGHTS

    with_hub(whole_model(), body)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_file_with_another_digest_than_its_commit_states_never_gets_its_name(tmp_path: Path, name: str) -> None:
    async def body(fake: FakeHub) -> None:
        async def swap(request: web.Request, wanted: str) -> web.StreamResponse | None:
            return web.Response(body=bytes(len(fake.files[name]))) if wanted == name else None

        fake.faults.append(swap)
        with pytest.raises(ModelError, match="arrived twice with another digest"):
            await resolve("owner/tiny", data=tmp_path, hub_url=fake.url)
        assert not (tmp_path / "models" / "owner--tiny" / COMMIT / name).exists()
        fake.faults.clear()
        await resolve("owner/tiny", data=tmp_path, hub_url=fake.url)

    with_hub(whole_model(), body)


def test_a_file_longer_than_its_commit_states_is_not_read_to_its_end(tmp_path: Path) -> None:
    async def body(fake: FakeHub) -> None:
        async def endless(request: web.Request, wanted: str) -> web.StreamResponse | None:
            return web.Response(body=fake.files[wanted] + b"x" * 9_000_000) if wanted == "model.safetensors" else None

        fake.faults.append(endless)
        with pytest.raises(ModelError, match="longer than its commit states"):
            await resolve("owner/tiny", data=tmp_path, hub_url=fake.url)

    with_hub(whole_model(), body)


def test_a_busy_hub_is_asked_again_and_a_dead_one_is_not_for_ever(tmp_path: Path) -> None:
    async def body(fake: FakeHub) -> None:
        statuses = [503, 429, 500]

        async def busy(request: web.Request, wanted: str) -> web.StreamResponse | None:
            return web.Response(status=statuses.pop()) if statuses and wanted == "config.json" else None

        fake.faults.append(busy)
        await resolve("owner/tiny", data=tmp_path, hub_url=fake.url)

        async def broken(request: web.Request, wanted: str) -> web.StreamResponse | None:
            return web.Response(status=500)

        fake.faults[:] = [broken]
        with pytest.raises(ModelError, match="answered HTTP 500"):
            await resolve("owner/tiny", data=tmp_path / "other", hub_url=fake.url)

    with_hub(whole_model(), body)


def test_a_model_that_is_absent_or_locked_says_so(tmp_path: Path) -> None:
    async def body(fake: FakeHub) -> None:
        with pytest.raises(ModelError, match="owner/nothing at revision 'main' does not exist"):
            await resolve("owner/nothing", data=tmp_path, hub_url=fake.url)

        async def gated(request: web.Request, wanted: str) -> web.StreamResponse | None:
            return web.Response(status=403)

        fake.faults.append(gated)
        with pytest.raises(ModelError, match="accept its licence there and set GRIDMILL_HUB_TOKEN"):
            await resolve("owner/tiny", data=tmp_path, hub_url=fake.url)

    with_hub(whole_model(), body)


def test_names_from_the_hub_never_leave_the_models_folder(tmp_path: Path) -> None:
    async def body(fake: FakeHub) -> None:
        for name in ("../evil.safetensors", "/tmp/evil.safetensors", "..\\evil.safetensors", "C:evil.safetensors"):
            fake.extra_siblings.append({"rfilename": name, "size": 1, "blobId": "0" * 40})
        with pytest.raises(ModelError, match="holds no weights"):
            await resolve("owner/tiny", data=tmp_path / "d", hub_url=fake.url)
        assert not list(tmp_path.rglob("*evil*"))
        assert not [name for name, _ in fake.requests if "evil" in name]

    with_hub(text_files(), body)


def test_something_that_is_no_hub_is_named_as_such(tmp_path: Path) -> None:
    async def body(fake: FakeHub) -> None:
        fake.extra_siblings.append({"no": "name"})
        with pytest.raises(ModelError, match="did not answer like a Hugging Face hub"):
            await resolve("owner/tiny", data=tmp_path, hub_url=fake.url)

    with_hub(whole_model(), body)


def test_offline_with_nothing_cached_is_one_sentence_that_says_what_to_do(tmp_path: Path) -> None:
    sentence = refusal("owner/tiny", tmp_path, hub_url="http://127.0.0.1:1")
    assert sentence.startswith("owner/tiny is not on this machine and http://127.0.0.1:1 cannot be reached")
    assert "--model gridmill/demo" in sentence and "\n" not in sentence


def test_a_download_that_rotted_on_disk_is_refused_and_healed_once_deleted(tmp_path: Path) -> None:
    async def body(fake: FakeHub) -> None:
        first = await resolve("owner/tiny", data=tmp_path, hub_url=fake.url)
        weights = first.folder / "model.safetensors"
        weights.write_bytes(WEIGHTS[:-1] + b"!")
        with pytest.raises(ModelError, match="delete that file and start again"):
            await resolve("owner/tiny", data=tmp_path, hub_url=fake.url)
        weights.unlink()
        again = await resolve("owner/tiny", data=tmp_path, hub_url=fake.url)
        assert again.model_class == first.model_class

    with_hub(whole_model(), body)


def test_a_tokenizer_that_rotted_on_disk_is_refused_even_by_echo(tmp_path: Path) -> None:
    async def body(fake: FakeHub) -> None:
        local = await resolve("owner/tiny", data=tmp_path, engine="echo", revision="main", hub_url=fake.url)
        path = local.folder / "tokenizer.json"
        path.write_bytes(path.read_bytes().replace(b'"c"', b'"d"'))
        with pytest.raises(ModelError, match=r"tokenizer\.json is not what was downloaded"):
            await resolve("owner/tiny", data=tmp_path, engine="echo", hub_url=fake.url)

    with_hub(whole_model(), body)


def test_echo_fetches_only_text_when_a_revision_is_given_and_native_completes_it(tmp_path: Path) -> None:
    async def body(fake: FakeHub) -> None:
        await resolve("owner/tiny", data=tmp_path, engine="echo", revision="main", hub_url=fake.url)
        assert "model.safetensors" not in [name for name, _ in fake.requests]
        local = await resolve("owner/tiny", data=tmp_path, hub_url=fake.url)
        assert "model.safetensors" in [file.name for file in local.model_class.weights]
        echo = await resolve("owner/tiny", data=tmp_path, engine="echo", hub_url="http://127.0.0.1:1")
        assert not echo.notes and echo.facts.vocab_size == 5

    with_hub(whole_model(), body)


def test_python_files_are_fetched_only_for_those_who_trust_them(tmp_path: Path) -> None:
    async def body(fake: FakeHub) -> None:
        plain = await resolve("owner/tiny", data=tmp_path / "a", hub_url=fake.url)
        assert not list(plain.folder.rglob("*.py"))
        trusted = await resolve("owner/tiny", data=tmp_path / "b", hub_url=fake.url, trust_remote_code=True)
        assert "modeling_tiny.py" in [file.name for file in trusted.model_class.weights]

    with_hub(whole_model() | {"modeling_tiny.py": b"raise SystemExit"}, body)


def test_a_cancelled_download_keeps_what_has_come(tmp_path: Path) -> None:
    async def body(fake: FakeHub) -> None:
        hanging = asyncio.Event()

        async def stall(request: web.Request, name: str) -> web.StreamResponse | None:
            if name != "model.safetensors":
                return None
            response = web.StreamResponse()
            response.content_length = len(WEIGHTS)
            await response.prepare(request)
            await response.write(WEIGHTS[:200_000])
            await hanging.wait()
            return response

        fake.faults.append(stall)
        arrived = asyncio.Event()

        def progress(what: str, done: int, total: int) -> None:
            if done >= 200_000:
                arrived.set()

        task = asyncio.create_task(resolve("owner/tiny", data=tmp_path, hub_url=fake.url, progress=progress))
        await asyncio.wait_for(arrived.wait(), 30)
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled()
        hanging.set()
        (part,) = tmp_path.rglob("model.safetensors.part")  # small files may have been on their way beside it
        assert WEIGHTS.startswith(part.read_bytes()) and part.stat().st_size >= 200_000 - 10_000

    with_hub(whole_model(), body)
