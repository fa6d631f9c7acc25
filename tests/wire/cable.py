"""A fake cable between two real links, for the link's tests and for the simulator.

Bytes travel as chunks with an arrival time. A cable can split chunks anywhere, delay, repeat, swap, alter and cut them;
what it does is decided by functions over the chunk, so that a test says in one line what goes wrong.
Time is the number `now` of the pair; nothing here looks at a clock.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from gridmill.wire.identity import Identity
from gridmill.wire.link import Closed, Event, Link, NetworkSide, NodeSide, Opened, Proven, Reason
from gridmill.wire.messages import VERSIONS, AnyMessage

HOST = "grid.example:8443"
Mangle = Callable[[bytes], Iterable[bytes]]


def entropy_from(seed: int) -> Callable[[int], bytes]:
    """Random bytes that are the same in every run."""
    import random

    return random.Random(seed).randbytes


@dataclass
class Cable:
    """One direction. `mangle` turns what was sent into what is delivered; `delay_seconds` is how long it takes."""

    delay_seconds: float = 0.0
    mangle: Mangle = field(default=lambda chunk: (chunk,))
    cut: bool = False  # nothing passes any more, and nobody is told (half-open)
    _flying: list[tuple[float, int, bytes]] = field(default_factory=list)
    _order: itertools.count[int] = field(default_factory=itertools.count)

    def carry(self, chunk: bytes, now: float) -> None:
        if self.cut:
            return
        for piece in self.mangle(chunk):
            heapq.heappush(self._flying, (now + self.delay_seconds, next(self._order), piece))

    def arrived(self, now: float) -> list[bytes]:
        pieces = []
        while self._flying and self._flying[0][0] <= now:
            pieces.append(heapq.heappop(self._flying)[2])
        return [] if self.cut else pieces

    def next_arrival(self) -> float:
        return self._flying[0][0] if self._flying and not self.cut else float("inf")


def split_every(size: int) -> Mangle:
    return lambda chunk: [chunk[start : start + size] for start in range(0, len(chunk), size)]


class LinkPair:
    """A node's link and the network's link, joined by two cables, with every event that each has seen."""

    def __init__(
        self,
        *,
        node_side: NodeSide | None = None,
        network_side: NetworkSide | None = None,
        node_versions: tuple[int, ...] = VERSIONS,
        network_versions: tuple[int, ...] = VERSIONS,
        admit: bool = True,
        seed: int = 1,
    ) -> None:
        entropy = entropy_from(seed)
        self.now = 1000.0
        self.node_side = node_side or NodeSide(Identity(entropy(32)), HOST, "test node")
        self.network_side = network_side or NetworkSide(
            Identity(entropy(32)), frozenset({HOST}), "test network", heartbeat_seconds=5.0
        )
        self.node = Link(self.node_side, entropy=entropy, now=self.now, versions=node_versions)
        self.network = Link(self.network_side, entropy=entropy, now=self.now, versions=network_versions)
        self.to_network = Cable()
        self.to_node = Cable()
        self.node_events: list[Event] = []
        self.network_events: list[Event] = []
        self.admit = admit

    # ------------------------------------------------------------ moving bytes

    def settle(self, rounds: int = 10_000) -> None:
        """Delivers at the present time until nothing moves any more."""
        for _ in range(rounds):
            if not self._round():
                return
        raise AssertionError("the two sides never come to rest")

    def run_until(self, time: float) -> None:
        """Lets time pass from one deadline or arrival to the next."""
        self.settle()
        while True:
            following = min(
                self.node.next_deadline(self.now),
                self.network.next_deadline(self.now),
                self.to_network.next_arrival(),
                self.to_node.next_arrival(),
            )
            if following > time:
                break
            self.now = max(self.now, following)
            self._note(self.node_events, self.node.tick(self.now))
            self._note(self.network_events, self.network.tick(self.now))
            self.settle()
        self.now = time
        self._note(self.node_events, self.node.tick(self.now))
        self._note(self.network_events, self.network.tick(self.now))
        self.settle()

    def run_for(self, seconds: float) -> None:
        self.run_until(self.now + seconds)

    def break_off(self) -> None:
        """The transport ends; both sides notice."""
        self.to_network.cut = self.to_node.cut = True
        self._note(self.node_events, self.node.eof(self.now))
        self._note(self.network_events, self.network.eof(self.now))

    def _round(self) -> bool:
        moved = False
        while data := self.node.take_bytes():
            self.to_network.carry(data, self.now)
            moved = True
        while data := self.network.take_bytes():
            self.to_node.carry(data, self.now)
            moved = True
        for piece in self.to_network.arrived(self.now):
            self._note(self.network_events, self.network.receive(piece, self.now))
            moved = True
        for piece in self.to_node.arrived(self.now):
            self._note(self.node_events, self.node.receive(piece, self.now))
            moved = True
        self._note(self.node_events, self.node.take_events())
        self._note(self.network_events, self.network.take_events())
        return moved

    def _note(self, events: list[Event], new: list[Event]) -> None:
        events += new
        if events is self.network_events and self.admit and any(isinstance(event, Proven) for event in new):
            self.network.admit(self.now)

    # ------------------------------------------------------------ what tests ask

    def open(self) -> LinkPair:
        self.settle()
        assert self.node.opened is not None and self.network.opened is not None, (self.node.closed, self.network.closed)
        return self

    def node_heard(self) -> list[AnyMessage]:
        return [event.message for event in self.node_events if not isinstance(event, (Proven, Opened, Closed))]

    def network_heard(self) -> list[AnyMessage]:
        return [event.message for event in self.network_events if not isinstance(event, (Proven, Opened, Closed))]

    def reasons(self) -> tuple[Reason | None, Reason | None]:
        """Why the node's and the network's link closed; None while open."""
        node, network = self.node.closed, self.network.closed
        return node.reason if node else None, network.reason if network else None
