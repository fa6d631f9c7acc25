"""Counters for Prometheus. Labels are few and bounded: never a key, an account, or a name that a client made up."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

TTFT_BUCKETS_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Metrics:
    """One set of counters per network, in a registry of its own so that two can live in one process."""

    content_type = "text/plain; version=0.0.4; charset=utf-8"

    def __init__(self, *, links: Callable[[], int], works: Callable[[], int]) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "gridmill_requests", "API requests answered", ("endpoint", "status"), registry=self._registry
        )
        self._ttft = Histogram(
            "gridmill_ttft_seconds",
            "From offering a work to its first token, as the network saw it",
            buckets=TTFT_BUCKETS_SECONDS,
            registry=self._registry,
        )
        self._tokens = Counter("gridmill_tokens_delivered", "Output token ids forwarded", registry=self._registry)
        self._moves = Counter(
            "gridmill_moves", "Works that left a node before their end, by reason", ("reason",), registry=self._registry
        )
        self._prompt_tokens = Counter("gridmill_prompt_tokens", "Prompt token ids accepted", registry=self._registry)
        self._queue = Gauge("gridmill_queue_length", "Requests that wait for a place", registry=self._registry)
        self._waits = Histogram(
            "gridmill_queue_seconds",
            "How long those that had to wait for a place stood in the line, found or not",
            buckets=TTFT_BUCKETS_SECONDS,
            registry=self._registry,
        )
        self._refused = Counter(
            "gridmill_requests_refused",
            "Works that got no place: full (as many wait as may), late (the wait was, or would be, too long), "
            "shed (others went first)",
            ("reason",),
            registry=self._registry,
        )
        node_links = Gauge("gridmill_links", "Nodes with a live link", registry=self._registry)
        node_links.set_function(lambda: float(links()))
        running = Gauge("gridmill_works_running", "Works that nodes are running", registry=self._registry)
        running.set_function(lambda: float(works()))

    def first_token(self, seconds: float) -> None:
        self._ttft.observe(seconds)

    def tokens_delivered(self, count: int) -> None:
        self._tokens.inc(count)

    def moved(self, code: str) -> None:
        self._moves.labels(code).inc()

    def queue_length(self, count: int) -> None:
        self._queue.set(count)

    def admission_waited(self, seconds: float) -> None:
        self._waits.observe(seconds)

    def admission_refused(self, reason: str) -> None:
        self._refused.labels(reason).inc()

    def request_ended(self, endpoint: str, status: int) -> None:
        self._requests.labels(endpoint, str(status)).inc()

    def prompt_accepted(self, tokens: int) -> None:
        self._prompt_tokens.inc(tokens)

    def exposition(self) -> bytes:
        return generate_latest(self._registry)
