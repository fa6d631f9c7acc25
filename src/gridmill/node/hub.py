"""Downloads a model's files from a Hugging Face hub: pinned to one commit, resumable, every byte verified.

1. A revision becomes a commit once, at the first download; later starts use that commit and ask nobody.
2. What is being fetched is `NAME.part`; it becomes NAME only when size and digest are those that the commit states.
3. Nothing here runs what it fetched, and no name from the hub leaves the model's own folder.

Large files have a SHA-256 in the hub's listing, small ones their git blob SHA-1; both come from the commit, so that a
mirror or a cache in between cannot change a file unnoticed.
"""
# ruff: noqa: ASYNC240 — blocking file calls are fine here: a node that downloads its model has nothing else to do.

from __future__ import annotations

import asyncio
import hashlib
import os
import re
import shutil
import ssl
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import quote

import aiohttp
import msgspec

from gridmill.node.settings import HUB_URL
from gridmill.wire.classes import FileDigest

MANIFEST = "gridmill-manifest.json"
LISTING_BYTES_MAX = 32 << 20  # the listing of a repo with tens of thousands of files
FILES_MAX = 4096  # more files than any model needs; a listing beyond it is no model
READ_BYTES = 1 << 20
PARALLEL_FILES = 3  # one connection seldom fills a line; many would look like an attack
ATTEMPTS_WITHOUT_PROGRESS = 4
BACKOFF_SECONDS = 1.0
CONNECT_TIMEOUT_SECONDS = 10.0
READ_TIMEOUT_SECONDS = 60.0  # a hub that says nothing for a minute has lost us
SPARE_DISK_BYTES = 256 << 20  # so that a download never fills the disk to its last byte

_REPO = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
_REVISION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,127}")
_COMMIT = re.compile(r"[0-9a-f]{40}")

Progress = Callable[[str, int, int], None]  # (what, bytes done, bytes in all)


class HubError(Exception):
    """A download that cannot be done; one sentence that says what to do."""


class HubUnreachable(HubError):
    """Nobody answered: offline, or no hub at that address."""


class HubManifest(msgspec.Struct, frozen=True):
    """What one commit of a repo holds, once all of it is here and verified. Lies beside the files."""

    repo: str
    commit: str
    files: tuple[FileDigest, ...]


@dataclass(frozen=True)
class HubFile:
    """One file of a commit. One of the two digests is always there."""

    name: str
    size_bytes: int
    sha256: str | None
    git_sha1: str | None


def is_repo_id(model: str) -> bool:
    return _REPO.fullmatch(model) is not None and ".." not in model


def cached(models: Path, repo: str, revision: str | None) -> tuple[Path, HubManifest] | None:
    """The folder of a complete earlier download, without asking anybody. `revision` None means the one pinned first."""
    root = _repo_folder(models, repo)
    commit = revision if revision and _COMMIT.fullmatch(revision) else _pins(root).get(revision or "main")
    if commit is None:
        return None
    try:
        manifest = msgspec.json.decode((root / commit / MANIFEST).read_bytes(), type=HubManifest)
    except (OSError, msgspec.MsgspecError):
        return None
    for file in manifest.files:  # digests are checked at load; a file that is gone or cut is simply fetched again
        path = root / commit / file.name
        if not is_plain_name(file.name) or not path.is_file() or path.stat().st_size != file.size_bytes:
            return None
    return root / commit, manifest


async def download(
    models: Path,
    repo: str,
    revision: str | None,
    *,
    wanted: Callable[[list[str]], list[str]],
    also_wanted: Callable[[Path], list[str]] = lambda folder: [],
    hub_url: str = HUB_URL,
    token: str | None = None,
    progress: Progress = lambda what, done, total: None,
) -> tuple[Path, HubManifest]:
    """Fetches the files that `wanted` picks from the listing, then those that `also_wanted` reads out of them.

    Returns the folder and its manifest. Raises HubError. Cancelling it keeps what has come so far.
    """
    if not is_repo_id(repo):
        raise HubError(f"{repo!r} is neither a folder here nor a repo id of the form OWNER/NAME")
    if revision is not None and not _REVISION.fullmatch(revision):
        raise HubError(f"{revision!r} is no revision: give a branch, a tag or a commit")
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT_SECONDS, sock_read=READ_TIMEOUT_SECONDS)
    headers = {"Authorization": f"Bearer {token}"} if token else {}  # aiohttp drops it when redirected to another host
    async with aiohttp.ClientSession(timeout=timeout, trust_env=True, auto_decompress=False) as session:
        hub = _Hub(session, hub_url.rstrip("/"), headers, repo)
        commit, listing = await hub.listing(revision or "main")
        root = _repo_folder(models, repo)
        folder = root / commit
        folder.mkdir(parents=True, exist_ok=True)
        names = wanted(sorted(listing))
        files = await _fetch_all(hub, commit, folder, [listing[name] for name in names], progress)
        more = also_wanted(folder)
        absent = [name for name in more if name not in listing]
        if absent:
            raise HubError(f"{repo} names the file {absent[0]!r} but does not hold it; its author must repair it")
        files += await _fetch_all(hub, commit, folder, [listing[name] for name in more if name not in names], progress)
    manifest = HubManifest(repo, commit, tuple(sorted(files)))
    write_whole(folder / MANIFEST, msgspec.json.encode(manifest))
    if revision is None or not _COMMIT.fullmatch(revision):
        write_whole(root / "pins.json", msgspec.json.encode(_pins(root) | {revision or "main": commit}))
    return folder, manifest


def write_whole(path: Path, content: bytes) -> None:
    """The file appears whole or not at all, whatever is killed meanwhile."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.new")
    path.parent.mkdir(parents=True, exist_ok=True)
    with unfinished.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(path)


def is_plain_name(name: str) -> bool:
    """A relative path that stays inside its folder and means the same everywhere."""
    parts = PurePosixPath(name).parts
    return (
        bool(parts)
        and name.isprintable()
        and "\\" not in name
        and ":" not in name
        and not name.startswith("/")
        and (".." not in parts)
    )


# ---------------------------------------------------------------- talking to the hub


class _Hub:
    """One repo on one hub: the listing of a commit, and byte ranges of its files."""

    def __init__(self, session: aiohttp.ClientSession, url: str, headers: dict[str, str], repo: str) -> None:
        self._session = session
        self._url = url
        self._headers = headers
        self.repo = repo

    async def listing(self, revision: str) -> tuple[str, dict[str, HubFile]]:
        """The commit that `revision` means now, and its files by name. Raises HubError."""
        address = f"{self._url}/api/models/{self.repo}/revision/{quote(revision, safe='')}?blobs=true"
        raw = await self._retried(lambda: self._small(address, revision))
        try:
            document = msgspec.json.decode(raw)
            commit, siblings = document["sha"], document["siblings"]
            files = [_hub_file(entry) for entry in siblings]
        except (msgspec.MsgspecError, KeyError, TypeError, ValueError, AttributeError) as error:
            raise HubError(f"{self._url} did not answer like a Hugging Face hub ({error})") from error
        if not isinstance(commit, str) or not _COMMIT.fullmatch(commit) or len(files) > FILES_MAX:
            raise HubError(f"{self._url} did not answer like a Hugging Face hub (no commit, or too many files)")
        return commit, {file.name: file for file in files if file is not None}

    async def _small(self, address: str, revision: str) -> bytes:
        async with self._session.get(address, headers=self._headers) as response:
            self._check_status(response, f"{self.repo} at revision {revision!r}")
            raw = await response.content.read(LISTING_BYTES_MAX)
            while piece := await response.content.read(LISTING_BYTES_MAX):
                raw += piece
                if len(raw) > LISTING_BYTES_MAX:
                    raise HubError(f"{self._url} sent a listing over {LISTING_BYTES_MAX} bytes")
            return raw

    async def fetch(self, commit: str, file: HubFile, part: Path, advance: Callable[[int], None]) -> FileDigest:
        """Brings `part` to its full size, going on from what it holds, and verifies it. Raises HubError."""
        for fresh in (False, True):
            if fresh:
                part.unlink(missing_ok=True)
            await self._retried(lambda: self._pull(commit, file, part, advance), progress_of=part)
            digest = await asyncio.to_thread(_verified, part, file)
            if digest is not None:
                return digest
            advance(-file.size_bytes)
        part.unlink(missing_ok=True)
        raise HubError(
            f"{file.name} of {self.repo} arrived twice with another digest than its commit states; "
            f"something between here and {self._url} changes files"
        )

    async def _pull(self, commit: str, file: HubFile, part: Path, advance: Callable[[int], None]) -> None:
        have = part.stat().st_size if part.exists() else 0
        if have > file.size_bytes:
            part.unlink()
            advance(-have)
            have = 0
        if have == file.size_bytes and have > 0:
            return
        address = f"{self._url}/{self.repo}/resolve/{commit}/{quote(file.name)}"
        headers = self._headers | {"Accept-Encoding": "identity"}
        if have:
            headers["Range"] = f"bytes={have}-"
        async with self._session.get(address, headers=headers) as response:
            if have and response.status != 206:  # a server that knows no ranges starts again, and so do we
                part.unlink()
                advance(-have)
                have = 0
                if response.status == 416:
                    raise aiohttp.ClientPayloadError("the server refused to go on where the last download was cut")
            self._check_status(response, f"{file.name} of {self.repo}")
            if have and not response.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
                part.unlink()
                advance(-have)
                raise aiohttp.ClientPayloadError("the server sent another range than the one asked for")
            with part.open("ab") as out:
                async for piece in response.content.iter_chunked(READ_BYTES):
                    have += len(piece)
                    if have > file.size_bytes:
                        raise HubError(f"{file.name} of {self.repo} is longer than its commit states")
                    out.write(piece)
                    advance(len(piece))
                out.flush()
                os.fsync(out.fileno())
        if have < file.size_bytes:
            raise aiohttp.ClientPayloadError("the connection was cut")

    def _check_status(self, response: aiohttp.ClientResponse, what: str) -> None:
        status = response.status
        if status in (200, 206):
            return
        if status in (401, 403):
            raise HubError(
                f"{self._url} does not give out {what} (HTTP {status}): if it exists, accept its licence there "
                "and set GRIDMILL_HUB_TOKEN to a token of yours"
            )
        if status == 404:
            raise HubError(f"{what} does not exist on {self._url}; check the spelling, or give the path of a folder")
        if status in (408, 429) or status >= 500:
            raise _TryAgain(f"{self._url} answered HTTP {status} for {what}")
        raise HubError(f"{self._url} answered HTTP {status} for {what}")

    async def _retried(self, act: Callable[[], Any], progress_of: Path | None = None) -> Any:
        """`act` until it succeeds, or got nowhere several times in a row; a cut that brought bytes is progress."""
        failures = 0
        size = -1
        while True:
            try:
                return await act()
            except (aiohttp.ClientError, TimeoutError, OSError, ssl.SSLError, _TryAgain) as error:
                if isinstance(error, OSError) and not isinstance(error, aiohttp.ClientError | TimeoutError):
                    raise HubError(f"{self.repo} cannot be written here: {error}") from error
                reached = progress_of.stat().st_size if progress_of is not None and progress_of.exists() else -1
                failures = 0 if reached > size else failures + 1
                size = max(size, reached)
                unreachable = isinstance(error, aiohttp.ClientConnectorError)
                if failures >= ATTEMPTS_WITHOUT_PROGRESS or (unreachable and failures):
                    sentence = str(error) or type(error).__name__
                    if unreachable:
                        raise HubUnreachable(f"{self._url} cannot be reached ({sentence})") from error
                    raise HubError(f"downloading {self.repo} from {self._url} failed: {sentence}") from error
                await asyncio.sleep(BACKOFF_SECONDS * 2**failures / 4)


class _TryAgain(Exception):
    """The hub is busy."""


def _hub_file(entry: Any) -> HubFile | None:
    """One sibling of the listing; None for what could never be wanted. Raises on what is no listing."""
    name = entry["rfilename"]
    large = entry.get("lfs") or {}
    size, sha256, git_sha1 = entry.get("size", large.get("size")), large.get("sha256"), entry.get("blobId")
    if not isinstance(name, str) or not is_plain_name(name) or not isinstance(size, int) or size < 0:
        return None
    if not (isinstance(sha256, str) and re.fullmatch(r"[0-9a-f]{64}", sha256)):
        sha256 = None
    if not (isinstance(git_sha1, str) and _COMMIT.fullmatch(git_sha1)) or large:
        git_sha1 = None  # of a large file the blob is only a pointer
    return HubFile(name, size, sha256, git_sha1) if sha256 or git_sha1 else None


async def _fetch_all(
    hub: _Hub, commit: str, folder: Path, files: Iterable[HubFile], progress: Progress
) -> list[FileDigest]:
    files = list(files)
    total = sum(file.size_bytes for file in files)
    done = sum(_bytes_here(folder, file) for file in files)
    needed = total - done
    free = shutil.disk_usage(folder).free
    if needed and needed + SPARE_DISK_BYTES > free:
        raise HubError(
            f"{hub.repo} needs {needed / 1e9:.1f} GB more and {folder} has {free / 1e9:.1f} GB free; "
            "free some, or choose another --data folder"
        )
    places = asyncio.Semaphore(PARALLEL_FILES)

    def advance(count: int) -> None:
        nonlocal done
        done += count
        progress(f"downloading {hub.repo}", done, total)

    async def one(file: HubFile) -> FileDigest:
        async with places:
            path = folder / file.name
            if path.exists():
                digest = await asyncio.to_thread(_verified, path, file)
                if digest is not None:
                    return digest
                before = _bytes_here(folder, file)
                path.unlink()
                advance(_bytes_here(folder, file) - before)
            path.parent.mkdir(parents=True, exist_ok=True)
            part = path.with_name(path.name + ".part")
            digest = await hub.fetch(commit, file, part, advance)
            part.replace(path)
            return digest

    failures: list[HubError] = []
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one(file)) for file in files]
    except* HubError as errors:
        failures += [error for error in errors.exceptions if isinstance(error, HubError)]
    if failures:
        raise failures[0]  # what a person needs; the others are its company
    return [task.result() for task in tasks]


def _bytes_here(folder: Path, file: HubFile) -> int:
    path = folder / file.name
    for candidate in (path, path.with_name(path.name + ".part")):
        if candidate.exists():
            return min(candidate.stat().st_size, file.size_bytes)
    return 0


def _verified(path: Path, file: HubFile) -> FileDigest | None:
    """The digest of a file that is what the commit states; None when it is not."""
    size = path.stat().st_size
    if size != file.size_bytes:
        return None
    sha256 = hashlib.sha256()
    git_sha1 = hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
    with path.open("rb") as opened:
        while piece := opened.read(READ_BYTES):
            sha256.update(piece)
            if file.git_sha1 is not None:
                git_sha1.update(piece)
    if file.sha256 is not None and sha256.hexdigest() != file.sha256:
        return None
    if file.git_sha1 is not None and git_sha1.hexdigest() != file.git_sha1:
        return None
    return FileDigest(file.name, sha256.hexdigest(), size)


def _repo_folder(models: Path, repo: str) -> Path:
    return models / repo.replace("/", "--")


def _pins(root: Path) -> dict[str, str]:
    try:
        return msgspec.json.decode((root / "pins.json").read_bytes(), type=dict[str, str])
    except (OSError, msgspec.MsgspecError):
        return {}
