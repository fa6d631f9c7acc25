"""What the network has sent to a node, so that cached input is priced by its own record and not by the node's word.

A prompt is cut into blocks; each block's hash covers all before it, the class and the account's cache salt, so that
what one account sent is never found by another. The record forgets as an engine's cache would: the oldest first, the
end of a text before its beginning, and everything after a while. So whoever has a block has all before it.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict

from gridmill.wire.messages import NodeId

BLOCK_TOKENS = 16  # what engines cache by: vLLM's default page, and ours
BLOCK_BYTES = BLOCK_TOKENS * 4
STRIDE_TOKENS = 256  # what the search goes by before it looks closer, and what the index of holders knows
STRIDE_BYTES = STRIDE_TOKENS * 4
BLOCKS_LOOKED_AT_MAX = 4096  # 65,000 tokens: about 5 ms of hashing when all are wanted
BLOCKS_REMEMBERED_MAX = 1 << 16  # a million tokens per node; each takes about 150 bytes here
REMEMBERED_SECONDS = 300.0
HOLDERS_MAX = 3  # nodes that the index knows of one text
INDEXED_MAX = 1 << 17  # 33 million tokens, about 40 MiB


class Text:
    """One prompt's chain of hashes, made only as far as somebody asks and then kept."""

    def __init__(self, class_id: str, salt: bytes, ids: bytes) -> None:
        self._ids = ids[: BLOCKS_LOOKED_AT_MAX * BLOCK_BYTES]
        start = hashlib.blake2b(b"gridmill-prefix-v1\0" + class_id.encode() + b"\0" + salt, digest_size=16)
        self._states = [start]  # at each stride
        self._strides: list[bytes] = []
        self._near: dict[int, list[bytes]] = {}
        self.tokens = len(ids) // 4

    def stride(self, number: int) -> bytes | None:
        """The hash of all up to the end of this stride; None where the prompt has no whole one."""
        while len(self._strides) <= number:
            at = len(self._strides) * STRIDE_BYTES
            if at + STRIDE_BYTES > len(self._ids):
                return None
            state = self._states[-1].copy()
            state.update(self._ids[at : at + STRIDE_BYTES])
            self._states.append(state)
            self._strides.append(state.digest())
        return self._strides[number]

    def block(self, stride: int, number: int) -> bytes | None:
        """The hash up to the end of a block within the stride that follows `stride` whole ones."""
        near = self._near.setdefault(stride, [])
        if number < len(near):
            return near[number]
        at = stride * STRIDE_BYTES
        end = at + (number + 1) * BLOCK_BYTES
        if end > len(self._ids) or (stride and self.stride(stride - 1) is None):
            return None
        state = self._states[stride].copy()
        state.update(self._ids[at : at + len(near) * BLOCK_BYTES])
        while len(near) <= number:
            begin = at + len(near) * BLOCK_BYTES
            state.update(self._ids[begin : begin + BLOCK_BYTES])
            near.append(state.copy().digest())
        return near[number]

    def head(self, strides_max: int) -> bytes | None:
        """The hash of its first strides, at most so many; None for a prompt that has no whole one."""
        whole = min(strides_max, len(self._ids) // STRIDE_BYTES)
        return self.stride(whole - 1) if whole else None


class Holders:
    """Which nodes were sent a text lately, for the whole network: strides of texts to a few nodes, the newest first."""

    def __init__(self) -> None:
        self._nodes: OrderedDict[bytes, tuple[NodeId, ...]] = OrderedDict()

    def note(self, stride: bytes, node_id: NodeId) -> None:
        known = self._nodes.pop(stride, ())
        self._nodes[stride] = (node_id, *(other for other in known if other != node_id))[:HOLDERS_MAX]
        if len(self._nodes) > INDEXED_MAX:
            self._nodes.popitem(last=False)

    def of(self, text: Text) -> tuple[NodeId, ...]:
        """Those who hold the longest known part of it."""
        found: tuple[NodeId, ...] = ()
        number = 0
        while (stride := text.stride(number)) is not None and (nodes := self._nodes.get(stride)) is not None:
            found = nodes
            number += 1
        return found


class SentPrefixes:
    """One node's record. Times are monotonic seconds. What it is sent is noted with `holders` under its name."""

    def __init__(self, holders: Holders | None = None, node_id: NodeId = NodeId("")) -> None:  # noqa: B008
        self._blocks: OrderedDict[bytes, float] = OrderedDict()
        self._holders = holders
        self._node_id = node_id

    def cached_tokens(self, class_id: str, salt: bytes, prompt: bytes, now: float) -> int:
        """How many ids at the beginning of `prompt` (packed) this node was sent before. The last id never counts: it
        has to be computed for the first new one."""
        return self.cached(Text(class_id, salt, prompt), now)

    def cached(self, text: Text, now: float) -> int:
        """The same of a text whose hashes others may ask for too."""
        strides = 0
        while self._has(text.stride(strides), now):
            strides += 1
        blocks = 0
        while self._has(text.block(strides, blocks), now):
            blocks += 1
        return min(strides * STRIDE_TOKENS + blocks * BLOCK_TOKENS, max(0, text.tokens - 1))

    def _has(self, block: bytes | None, now: float) -> bool:
        sent = self._blocks.get(block) if block is not None else None
        return sent is not None and now - sent <= REMEMBERED_SECONDS

    def remember(self, class_id: str, salt: bytes, ids: bytes, now: float) -> None:
        """This node has computed these ids (packed): a prompt, and what it answered."""
        blocks = self._blocks
        hashes = _blocks(class_id, salt, ids)
        for block in reversed(hashes):  # the beginning is forgotten last
            blocks[block] = now
            blocks.move_to_end(block)
        while len(blocks) > BLOCKS_REMEMBERED_MAX:
            blocks.popitem(last=False)
        if self._holders is not None:
            per_stride = STRIDE_TOKENS // BLOCK_TOKENS
            for stride in reversed(hashes[per_stride - 1 :: per_stride]):
                self._holders.note(stride, self._node_id)


def _blocks(class_id: str, salt: bytes, ids: bytes) -> list[bytes]:
    running = hashlib.blake2b(b"gridmill-prefix-v1\0" + class_id.encode() + b"\0" + salt, digest_size=16)
    found = []
    for start in range(0, min(len(ids) - BLOCK_BYTES + 1, BLOCKS_LOOKED_AT_MAX * BLOCK_BYTES), BLOCK_BYTES):
        running.update(ids[start : start + BLOCK_BYTES])
        found.append(running.copy().digest())
    return found
