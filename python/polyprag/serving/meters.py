"""What Prometheus may read: how much is asked, how long it takes, and where requests wait."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128)


class Meters:
    """One server's metrics, in a registry of their own."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self.requests = Counter(
            "polyprag_requests", "Requests, by path and status.", ["path", "status"], registry=registry
        )
        self.request_seconds = Histogram(
            "polyprag_request_seconds",
            "Time to the end of an answer.",
            ["path"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.given_up = Counter(
            "polyprag_given_up",
            "Answers that were ended before their time: nobody waited any more, or it took too long.",
            registry=registry,
        )
        self.find_seconds = Histogram(
            "polyprag_find_seconds",
            "Time to find documents and combine their routes.",
            buckets=_SECONDS,
            registry=registry,
        )
        self.first_token_seconds = Histogram(
            "polyprag_first_token_seconds",
            "Time to the first text of an answer.",
            buckets=_SECONDS,
            registry=registry,
        )
        self.queue_seconds = Histogram(
            "polyprag_queue_seconds",
            "Time that a row waited for a place.",
            buckets=_SECONDS,
            registry=registry,
        )
        self.step_seconds = Histogram(
            "polyprag_step_seconds", "Time of one token of the batch.", buckets=_SECONDS, registry=registry
        )
        self.batch_rows = Histogram(
            "polyprag_batch_rows", "Rows that were decoded together.", buckets=_ROWS, registry=registry
        )
        self.tokens = Counter(
            "polyprag_tokens", "Tokens that were read and generated.", ["kind"], registry=registry
        )
        self.reloads = Counter(
            "polyprag_reloads", "Generations that were taken over, or refused.", ["result"], registry=registry
        )

    def follow(self, name: str, help: str, value: Callable[[], float]) -> None:
        """A gauge that is read when it is asked for."""
        Gauge(f"polyprag_{name}", help, registry=self._registry).set_function(value)

    def admitted(self, waited: float) -> None:
        self.queue_seconds.observe(waited)

    def stepped(self, rows: int, seconds: float) -> None:
        self.batch_rows.observe(rows)
        self.step_seconds.observe(seconds)

    def text(self) -> bytes:
        """All of it, in Prometheus' text format."""
        return generate_latest(self._registry)
