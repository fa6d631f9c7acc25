"""What the network has sent to a node, so that cached input is priced by its own record and not by the node's word.

A prompt is cut into blocks; each block's hash covers all before it, the class and the account's cache salt, so that
what one account sent is never found by another. The record forgets as an engine's cache would: the oldest first, and
everything after a while.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict

BLOCK_TOKENS = 16  # what engines cache by: vLLM's default page, and ours
BLOCK_BYTES = BLOCK_TOKENS * 4
BLOCKS_LOOKED_AT_MAX = 4096  # 65,000 tokens: about 5 ms of hashing
BLOCKS_REMEMBERED_MAX = 1 << 16  # a million tokens per node; each takes about 150 bytes here
REMEMBERED_SECONDS = 300.0


class SentPrefixes:
    """One node's record. Times are monotonic seconds."""

    def __init__(self) -> None:
        self._blocks: OrderedDict[bytes, float] = OrderedDict()

    def cached_tokens(self, class_id: str, salt: bytes, prompt: bytes, now: float) -> int:
        """How many ids at the beginning of `prompt` (packed) this node was sent before. The last id never counts: it
        has to be computed for the first new one."""
        found = 0
        for block in _blocks(class_id, salt, prompt):
            sent = self._blocks.get(block)
            if sent is None or now - sent > REMEMBERED_SECONDS:
                break
            found += BLOCK_TOKENS
        return min(found, max(0, len(prompt) // 4 - 1))

    def remember(self, class_id: str, salt: bytes, ids: bytes, now: float) -> None:
        """This node has computed these ids (packed): a prompt, and what it answered."""
        blocks = self._blocks
        for block in _blocks(class_id, salt, ids):
            blocks[block] = now
            blocks.move_to_end(block)
        while len(blocks) > BLOCKS_REMEMBERED_MAX:
            blocks.popitem(last=False)


def _blocks(class_id: str, salt: bytes, ids: bytes) -> list[bytes]:
    running = hashlib.blake2b(b"gridmill-prefix-v1\0" + class_id.encode() + b"\0" + salt, digest_size=16)
    found = []
    for start in range(0, min(len(ids) - BLOCK_BYTES + 1, BLOCKS_LOOKED_AT_MAX * BLOCK_BYTES), BLOCK_BYTES):
        running.update(ids[start : start + BLOCK_BYTES])
        found.append(running.copy().digest())
    return found
