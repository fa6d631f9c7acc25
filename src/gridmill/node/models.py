"""From what a person calls a model to what the network calls a class: find, fetch, digest, describe.

1. A folder, a hub repo at a pinned commit and the built-in demo all end as one folder, and go one road from there.
2. Only *.safetensors are weights: other checkpoint formats run code when they are read.
3. Whatever cannot be served is one sentence that says what to do (ModelError).
"""

from __future__ import annotations

import asyncio
import hashlib
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import msgspec

from gridmill.demo import DEMO_MODEL_NAME, demo_model_folder
from gridmill.node import hub
from gridmill.node.engines.base import Served
from gridmill.node.hub import HubError, HubManifest, HubUnreachable, Progress, is_plain_name, is_repo_id, write_whole
from gridmill.node.settings import HUB_URL, DTypeChoice
from gridmill.wire.classes import (
    TOKENIZER_BYTES_MAX,
    FileDigest,
    ModelClass,
    TextFacts,
    facts_bytes,
    parse_facts,
)
from gridmill.wire.sampling import SAMPLER_VERSION

INDEX = "model.safetensors.index.json"
JSON_BYTES_MAX = 32 << 20  # a config with everything inlined; the largest index of a public model is under 20 MB
SHARDS_MAX = 1024  # the largest public checkpoints have under 300
ECHO_CONTEXT_TOKENS = 8192  # for a tokenizer that comes without any word about the model's context
READ_BYTES = 1 << 20

DTYPES = ("float32", "bfloat16", "float16")

# Everything about text that transformers reads from a model's folder.
TEXT_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "tokenizer.model",
    "spiece.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
)


class ModelError(Exception):
    """A model that cannot be served; one sentence that says what to do."""


@dataclass(frozen=True)
class LocalModel:
    """A model on this machine with its class. `files`: sha256 → bytes of tokenizer.json and the text facts.

    `dtype` and `exact` are what the class says, settled; `notes` are lines that the person should see once.
    """

    folder: Path
    name: str
    model_class: ModelClass
    facts: TextFacts
    files: dict[str, bytes] = field(repr=False)
    dtype: str
    exact: bool
    notes: tuple[str, ...] = ()

    @property
    def served(self) -> Served:
        return Served(self.name, self.model_class, self.facts, self.files)


async def resolve(
    model: str,
    *,
    data: Path,
    engine: Literal["native", "echo"] = "native",
    name: str | None = None,
    revision: str | None = None,
    dtype: DTypeChoice = "auto",
    exact: bool | None = None,
    device: Callable[[], str] = lambda: "cpu",
    context_tokens: int | None = None,
    trust_remote_code: bool = False,
    hub_url: str = HUB_URL,
    hub_token: str | None = None,
    progress: Progress = lambda what, done, total: None,
) -> LocalModel:
    """Finds or fetches `model` (a folder, OWNER/NAME on the hub, or `gridmill/demo`) and computes its class.

    With `engine="echo"` only the tokenizer and what stands beside it are needed, and a name that is neither a folder
    nor cached is served with the demo's tokenizer; the hub is asked only when `revision` is given. `device` says what
    kind of device will compute, and is asked late, in a thread: finding out means importing torch. Raises ModelError.
    """
    try:
        found = await _locate(
            model,
            data=data,
            echo=engine == "echo",
            revision=revision,
            trust_remote_code=trust_remote_code,
            hub_url=hub_url,
            hub_token=hub_token,
            progress=progress,
        )
    except HubError as error:
        raise ModelError(str(error)) from error
    stop = threading.Event()
    try:
        return await asyncio.to_thread(
            _describe,
            found,
            name=name,
            echo=engine == "echo",
            dtype=dtype,
            exact=exact,
            device=device,
            context_tokens=context_tokens,
            trust_remote_code=trust_remote_code,
            digests=DigestCache(data / "digests.json", stop),
            converted=data / "tokenizers",
            progress=progress,
        )
    finally:
        stop.set()  # a thread cannot be cancelled, but it can be told


# ---------------------------------------------------------------- where it lies


@dataclass(frozen=True)
class _Found:
    folder: Path
    name: str
    toy: bool = False
    manifest: HubManifest | None = None
    notes: tuple[str, ...] = ()


async def _locate(
    model: str,
    *,
    data: Path,
    echo: bool,
    revision: str | None,
    trust_remote_code: bool,
    hub_url: str,
    hub_token: str | None,
    progress: Progress,
) -> _Found:
    if model == DEMO_MODEL_NAME:
        return _Found(_demo_folder(), DEMO_MODEL_NAME, toy=True)
    folder = _existing_folder(model)
    if folder is not None:
        if revision is not None:
            raise ModelError(f"--revision belongs to a model on the hub, and {model} is a folder here")
        return _Found(folder, _name_of(folder), toy=_is_demo(folder))
    models = data / "models"
    cached = hub.cached(models, model, revision) if is_repo_id(model) else None
    if cached is not None and (echo or any(file.name.endswith(".safetensors") for file in cached[1].files)):
        return _Found(cached[0], model, manifest=cached[1])
    if echo and revision is None:
        hint = "; give --revision main to fetch its own" if is_repo_id(model) else ""
        note = f"{model} is not on this machine, so echo serves it with the demo's tokenizer{hint}"
        return _Found(_demo_folder(), model, toy=True, notes=(note,))
    if not is_repo_id(model):
        raise ModelError(f"{model!r} is neither a folder here nor a repo id of the form OWNER/NAME on {hub_url}")

    def wanted(names: list[str]) -> list[str]:
        chosen = [text for text in TEXT_FILES if text in names]
        if trust_remote_code:
            chosen += [file for file in names if file.endswith(".py") and "/" not in file]
        return chosen if echo else chosen + weight_files(names, model)

    def shards(folder: Path) -> list[str]:
        return [] if echo or not (folder / INDEX).exists() else index_shards(folder / INDEX)

    try:
        fetched, manifest = await hub.download(
            models,
            model,
            revision,
            wanted=wanted,
            also_wanted=shards,
            hub_url=hub_url,
            token=hub_token,
            progress=progress,
        )
    except HubUnreachable as error:
        raise ModelError(
            f"{model} is not on this machine and {error}: connect to the internet, or give --model the path of a "
            f"folder that holds it, or try --model {DEMO_MODEL_NAME}, which is built in"
        ) from error
    return _Found(fetched, model, manifest=manifest)


def _existing_folder(model: str) -> Path | None:
    path = Path(model).expanduser()
    if path.is_dir():
        return path.resolve()
    if path.is_file():
        raise ModelError(f"{model} is a file; --model takes the folder that holds config.json and *.safetensors")
    if model.startswith(("/", "./", "../", "~", ".\\", "..\\")) or model in (".", ".."):
        raise ModelError(f"the folder {model} does not exist")
    return None


def _name_of(folder: Path) -> str:
    """The folder's own name, or OWNER/NAME for a snapshot inside the Hugging Face cache."""
    repo = folder.parent.parent.name
    if folder.parent.name == "snapshots" and repo.startswith("models--"):
        return repo.removeprefix("models--").replace("--", "/", 1)
    # A folder may be called anything; a model's name has no spaces, and '@' would select a class.
    return "-".join(folder.name.replace("@", " ").split()) or "model"


def _demo_folder() -> Path:
    folder = demo_model_folder()
    if not folder.is_dir():
        raise ModelError(f"this installation lacks the demo model at {folder}; install gridmill again")
    return folder.resolve()


def _is_demo(folder: Path) -> bool:
    try:
        return folder == _demo_folder()
    except ModelError:
        return False


# ---------------------------------------------------------------- which files


def weight_files(names: Iterable[str], model: str) -> list[str]:
    """Of all file names of a model, those that are its weights (shards that an index names not yet included).

    Raises ModelError when there are none, with the reason where one is known.
    """
    top = {name for name in names if "/" not in name}
    if INDEX in top:
        return [INDEX]
    if "model.safetensors" in top:
        return ["model.safetensors"]
    others = sorted(
        name for name in top if name.endswith(".safetensors") and not name.startswith(("adapter_", "consolidated"))
    )
    if others:
        return others
    if any(name.endswith((".bin", ".pt", ".pth", ".ckpt")) for name in top):
        raise ModelError(
            f"{model} comes only as a pickled checkpoint, which can run any code when it is loaded; "
            "use a version with *.safetensors, or convert it with transformers' save_pretrained"
        )
    if any(name.endswith(".gguf") for name in top):
        raise ModelError(f"{model} comes only as GGUF, which the native engine does not read; use its *.safetensors")
    if any(name.startswith("adapter_") for name in top):
        raise ModelError(f"{model} is an adapter without its base model; merge the two and save them together")
    raise ModelError(f"{model} holds no weights: there is no *.safetensors file")


def index_shards(index: Path) -> list[str]:
    """The shard files that an index names. Raises ModelError on names that leave the folder."""
    weight_map = _json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"{index} holds no weight_map")
    shards = sorted({str(shard) for shard in weight_map.values()})
    for shard in shards:
        if not is_plain_name(shard) or not shard.endswith(".safetensors"):
            raise ModelError(f"{index} names {shard!r}, which is no plain *.safetensors file of this model")
    if len(shards) > SHARDS_MAX:
        raise ModelError(f"{index} names over {SHARDS_MAX} files")
    return shards


def _manifest_names(folder: Path, model: str, *, trust_remote_code: bool) -> list[str]:
    """Every file that decides the ids, sorted."""
    names = [path.name for path in folder.iterdir() if path.is_file()]
    if "config.json" not in names:
        raise ModelError(f"{model} has no config.json in {folder}, so nobody knows what kind of model it is")
    chosen = weight_files(names, model)
    if chosen == [INDEX]:
        chosen += index_shards(folder / INDEX)
    chosen += [name for name in ("config.json", "generation_config.json") if name in names]
    if trust_remote_code:
        chosen += [name for name in names if name.endswith(".py")]
    return sorted(chosen)


class DigestCache:
    """SHA-256 of files, remembered by (path, size, mtime, inode) so that a restart does not read 100 GB again.

    `stop` ends a long computation early with ModelError, because threads cannot be cancelled.
    """

    def __init__(self, path: Path, stop: threading.Event) -> None:
        self._path = path
        self._stop = stop
        try:
            self._known = msgspec.json.decode(path.read_bytes(), type=dict[str, tuple[int, int, int, str]])
        except (OSError, msgspec.MsgspecError):
            self._known = {}  # a lost cache costs one more reading

    def digest(self, folder: Path, name: str, progress: Progress, done: int, total: int) -> FileDigest:
        path = folder / name
        before = path.stat()
        facts = (before.st_size, before.st_mtime_ns, before.st_ino)
        known = self._known.get(str(path))
        if known is not None and known[:3] == facts:
            return FileDigest(name, known[3], before.st_size)
        sha256 = hashlib.sha256()
        with path.open("rb") as opened:
            while piece := opened.read(READ_BYTES):
                if self._stop.is_set():
                    raise ModelError("stopped while reading the model's files")
                sha256.update(piece)
                done += len(piece)
                progress("checking files", done, total)
        after = path.stat()
        if (after.st_size, after.st_mtime_ns, after.st_ino) != facts:
            raise ModelError(f"{path} changed while it was being read; start again when it is complete")
        self._known[str(path)] = (*facts, sha256.hexdigest())
        return FileDigest(name, sha256.hexdigest(), before.st_size)

    def save(self) -> None:
        self._known = {path: known for path, known in self._known.items() if Path(path).exists()}
        write_whole(self._path, msgspec.json.encode(self._known))


def _digests_of(folder: Path, names: list[str], cache: DigestCache, progress: Progress) -> tuple[FileDigest, ...]:
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise ModelError(f"{folder} lacks {missing[0]}, which its index names; the download or copy is not complete")
    total = sum((folder / name).stat().st_size for name in names)
    done = 0
    digests = []
    for name in names:
        digests.append(cache.digest(folder, name, progress, done, total))
        done += digests[-1].size_bytes
    cache.save()
    return tuple(sorted(digests))


def _verify(found: _Found, manifest: HubManifest, cache: DigestCache, progress: Progress) -> None:
    """Files of a download must still be what its commit stated."""
    stated = {file.name: file for file in manifest.files}
    for digest in _digests_of(found.folder, sorted(stated), cache, progress):
        if digest != stated[digest.name]:
            raise ModelError(
                f"{found.folder / digest.name} is not what was downloaded (its digest differs); "
                "delete that file and start again, and it will be fetched anew"
            )


# ---------------------------------------------------------------- what it is


def _describe(
    found: _Found,
    *,
    name: str | None,
    echo: bool,
    dtype: DTypeChoice,
    exact: bool | None,
    device: Callable[[], str],
    context_tokens: int | None,
    trust_remote_code: bool,
    digests: DigestCache,
    converted: Path,
    progress: Progress,
) -> LocalModel:
    folder = found.folder
    notes = list(found.notes)
    config = _json_object(folder / "config.json") if (folder / "config.json").exists() else {}
    weights: tuple[FileDigest, ...] = ()
    if not echo:
        names = _manifest_names(folder, found.name, trust_remote_code=trust_remote_code)
        weights = _digests_of(folder, names, digests, progress)
    if found.manifest is not None:
        _verify(found, found.manifest, digests, progress)
    tokenizer = _tokenizer_json(folder, found.name, converted, notes, trust_remote_code=trust_remote_code)
    facts = _text_facts(folder, found.name, config, tokenizer, toy=found.toy, echo=echo, context_tokens=context_tokens)
    exact = found.toy if exact is None else exact
    settled = "none" if echo else settled_dtype(dtype, exact=exact, device=device, config=config)
    files = {hashlib.sha256(raw).hexdigest(): raw for raw in (tokenizer, facts_bytes(facts))}
    tokenizer_sha256, facts_sha256 = files
    model_class = ModelClass(
        weights=weights,
        arithmetic="echo" if echo else settled + ("-exact" if exact else ""),
        kv_dtype=settled,
        sampler_version=SAMPLER_VERSION,
        tokenizer_sha256=tokenizer_sha256,
        text_facts_sha256=facts_sha256,
    )
    return LocalModel(
        folder=folder,
        name=name or found.name,
        model_class=model_class,
        facts=facts,
        files=files,
        dtype=settled,
        exact=exact,
        notes=tuple(notes),
    )


def settled_dtype(dtype: DTypeChoice, *, exact: bool, device: Callable[[], str], config: dict[str, Any]) -> str:
    """What `auto` means: float32 on a CPU and in exact mode, elsewhere what the model was saved in."""
    if exact:
        if dtype not in ("auto", "float32"):
            raise ModelError(f"--exact computes in float32; leave out --dtype {dtype}, or give --no-exact")
        return "float32"
    if dtype != "auto":
        return dtype
    saved = str(_setting(config, "dtype") or _setting(config, "torch_dtype") or "float32").removeprefix("torch.")
    return "float32" if saved not in DTYPES or device() == "cpu" else saved


def _text_facts(
    folder: Path,
    model: str,
    config: dict[str, Any],
    tokenizer: bytes,
    *,
    toy: bool,
    echo: bool,
    context_tokens: int | None,
) -> TextFacts:
    about_tokenizer = _optional_object(folder / "tokenizer_config.json")
    special_tokens = _special_tokens(folder, about_tokenizer)
    try:
        ids = _ids_by_token(tokenizer)
    except (msgspec.MsgspecError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"the tokenizer.json of {model} holds no vocabulary ({error})") from error
    vocab_size = _setting(config, "vocab_size") or (max(ids.values()) + 1 if echo and ids else None)
    if not isinstance(vocab_size, int):
        raise ModelError(f"the config.json of {model} does not state vocab_size")
    facts = TextFacts(
        chat_template=_chat_template(folder, about_tokenizer),
        special_tokens=special_tokens,
        eos_token_ids=_eos_token_ids(folder, config, special_tokens, ids, vocab_size),
        context_tokens=_context_tokens(model, config, about_tokenizer, context_tokens, echo=echo),
        vocab_size=vocab_size,
        toy=toy,
    )
    try:
        return parse_facts(facts_bytes(facts))  # what the network will say of it, said here first
    except ValueError as error:
        raise ModelError(f"{model} cannot be described to a network: {error}") from error


def _chat_template(folder: Path, about_tokenizer: dict[str, Any]) -> str | None:
    """The order in which transformers looks: a file of its own first, then the tokenizer's configuration."""
    own = folder / "chat_template.jinja"
    if own.exists():
        return _small_file(own).decode("utf-8", "replace")
    template = _optional_object(folder / "chat_template.json").get("chat_template")
    template = template or about_tokenizer.get("chat_template")
    if isinstance(template, list):  # several by name; a plain request means the one called default
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None


def _special_tokens(folder: Path, about_tokenizer: dict[str, Any]) -> dict[str, str]:
    older = _optional_object(folder / "special_tokens_map.json")
    found = {}
    for key in ("bos_token", "eos_token", "pad_token", "unk_token"):
        value = about_tokenizer.get(key) or older.get(key)
        if isinstance(value, dict):  # a serialised AddedToken
            value = value.get("content")
        if isinstance(value, str):
            found[key] = value
    return found


def _eos_token_ids(
    folder: Path, config: dict[str, Any], special_tokens: dict[str, str], ids: dict[str, int], vocab_size: int
) -> tuple[int, ...]:
    """generation_config.json, else config.json; and always the tokenizer's own end token.

    The last matters for chat fine-tunes that kept the base model's generation_config.json.
    """
    stated = _optional_object(folder / "generation_config.json").get("eos_token_id")
    if stated is None:
        stated = _setting(config, "eos_token_id")
    listed = stated if isinstance(stated, list) else [stated]
    chosen = {token_id for token_id in listed if isinstance(token_id, int) and not isinstance(token_id, bool)}
    own = ids.get(special_tokens.get("eos_token", ""))
    if own is not None:
        chosen.add(own)
    return tuple(sorted(token_id for token_id in chosen if 0 <= token_id < vocab_size))


def _context_tokens(
    model: str, config: dict[str, Any], about_tokenizer: dict[str, Any], asked: int | None, *, echo: bool
) -> int:
    most = None
    for key in ("max_position_embeddings", "n_positions", "max_sequence_length", "seq_length"):
        most = most or _setting(config, key)
    if most is None:
        length = about_tokenizer.get("model_max_length")  # 1e30 stands for "nobody said"
        most = int(length) if isinstance(length, int | float) and 1 <= length <= 1 << 24 else None
    if most is None and echo:
        most = ECHO_CONTEXT_TOKENS
    if not isinstance(most, int) or most < 1:
        if asked is None:
            raise ModelError(f"the config.json of {model} states no context length; give --context-tokens")
        return asked
    if asked is not None and asked > most:
        raise ModelError(f"--context-tokens {asked} is more than {model} was made for, {most}")
    return asked or most


def _tokenizer_json(folder: Path, model: str, converted: Path, notes: list[str], *, trust_remote_code: bool) -> bytes:
    path = folder / "tokenizer.json"
    if not path.exists():
        path = _converted_tokenizer(folder, model, converted, trust_remote_code=trust_remote_code)
        notes.append(f"{model} has no tokenizer.json; one was converted from its older tokenizer files")
    if path.stat().st_size > TOKENIZER_BYTES_MAX:
        raise ModelError(f"{path} is over {TOKENIZER_BYTES_MAX} bytes, which no network would take")
    return path.read_bytes()


def _converted_tokenizer(folder: Path, model: str, converted: Path, *, trust_remote_code: bool) -> Path:
    """tokenizer.json made by transformers, kept under the digest of its sources so that it is made once."""
    sources = [folder / name for name in TEXT_FILES if (folder / name).exists() and name != "config.json"]
    if not any(path.name in ("tokenizer.model", "spiece.model", "vocab.json", "vocab.txt") for path in sources):
        raise ModelError(f"{model} has no tokenizer: there is no tokenizer.json in {folder}")
    key = hashlib.sha256()
    for path in sources:
        key.update(path.name.encode() + b"\0" + hashlib.sha256(_small_file(path)).digest())
    target = converted / key.hexdigest() / "tokenizer.json"
    if target.exists():
        return target
    try:
        from transformers import AutoTokenizer
    except ImportError:
        raise ModelError(
            f"{model} has no tokenizer.json, and converting its tokenizer needs more: pip install 'gridmill[node]'"
        ) from None
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=trust_remote_code)
        made = tokenizer.backend_tokenizer.to_str()
    except (ValueError, OSError, ImportError, AttributeError, KeyError) as error:
        raise ModelError(f"{model} has no tokenizer.json and its tokenizer cannot be converted: {error}") from error
    write_whole(target, made.encode())
    return target


def _ids_by_token(tokenizer: bytes) -> dict[str, int]:
    """Vocabulary and added tokens of a tokenizer.json. Raises on what is none."""
    document = msgspec.json.decode(tokenizer)
    vocabulary = document["model"]["vocab"]
    if not isinstance(vocabulary, dict):  # Unigram: a list of [token, score]
        vocabulary = {str(entry[0]): token_id for token_id, entry in enumerate(vocabulary)}
    ids = {str(token): int(token_id) for token, token_id in vocabulary.items()}
    ids.update({str(added["content"]): int(added["id"]) for added in document.get("added_tokens") or []})
    if not ids:
        raise ValueError("it is empty")
    return ids


def _setting(config: dict[str, Any], key: str) -> Any:
    """A value of config.json, from the part about text where a model also sees or hears."""
    value = config.get(key)
    inner = config.get("text_config")
    return inner.get(key) if value is None and isinstance(inner, dict) else value


def _optional_object(path: Path) -> dict[str, Any]:
    return _json_object(path) if path.exists() else {}


def _json_object(path: Path) -> dict[str, Any]:
    try:
        document = msgspec.json.decode(_small_file(path))
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ModelError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(document, dict):
        raise ModelError(f"{path} must hold a JSON object")
    return document


def _small_file(path: Path) -> bytes:
    if path.stat().st_size > JSON_BYTES_MAX:
        raise ModelError(f"{path} is over {JSON_BYTES_MAX} bytes, which is not what it claims to be")
    return path.read_bytes()
