"""What is counted for whoever watches the service, in Prometheus' format; nothing of what a request says is in it."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

if TYPE_CHECKING:
    from atman_kernels.result.explanation import Explanation

SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class Metrics:
    """The counters of one service."""

    def __init__(self) -> None:
        registry = self._registry = CollectorRegistry()
        self.requests = Counter(
            "atman_requests",
            "Requests, by what they asked for and how that ended",
            ["endpoint", "status"],
            registry=registry,
        )
        self.seconds = Histogram(
            "atman_request_seconds",
            "From the request's arrival to the end of its response",
            ["endpoint"],
            buckets=SECONDS,
            registry=registry,
        )
        self.waited = Histogram("atman_waiting_seconds", "In the queue", buckets=SECONDS, registry=registry)
        self.batches = Histogram(
            "atman_batch_requests",
            "Requests that were worked on together",
            buckets=(1, 2, 4, 8, 16, 32),
            registry=registry,
        )
        self.tokens = Counter(
            "atman_model_tokens", "Tokens through the model's layers, without those of answers", registry=registry
        )
        self.units = Counter("atman_units", "Units explained", registry=registry)
        self.cancelled = Counter("atman_cancelled", "Requests that ended before their work did", registry=registry)
        self.out_of_memory = Counter(
            "atman_out_of_memory_retries", "Forwards that were tried again with fewer tokens", registry=registry
        )
        self._queue = Gauge("atman_queue_requests", "Requests that wait", registry=registry)

    def watch_queue(self, length: Callable[[], int]) -> None:
        """From here on the queue's length is asked of `length` when metrics are read."""
        self._queue.set_function(length)

    def explained(self, explanations: "Sequence[Explanation]") -> None:
        """Of one call, whose cost all of its explanations state."""
        self.tokens.inc(explanations[0].stats.get("tokens_through_model", 0))
        self.units.inc(sum(len(each.units) for each in explanations))

    def text(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self._registry)
