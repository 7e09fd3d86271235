"""What the router counts, for Prometheus. Touched once per request, never per token."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server

_LATENCY_BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


class RouterMetrics:
    """Counters and gauges in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "baton_router_requests", "Requests that ended, by outcome.", ["outcome"], registry=self.registry
        )
        self.prompt_tokens = Counter("baton_router_prompt_tokens", "Prompt tokens.", registry=self.registry)
        self.output_tokens = Counter("baton_router_output_tokens", "Tokens received.", registry=self.registry)
        self.messages = Counter("baton_router_messages", "Messages to clients.", registry=self.registry)
        self.migrations = Counter("baton_router_migrations", "Sequences moved.", registry=self.registry)
        self.first_token = Histogram(
            "baton_router_time_to_first_token_seconds",
            "Request received to first token sent.",
            buckets=_LATENCY_BUCKETS_S,
            registry=self.registry,
        )

    def watch(self, name: str, text: str, read: Callable[[], float]) -> None:
        """A gauge that is read when it is scraped."""
        Gauge(f"baton_router_{name}", text, registry=self.registry).set_function(read)

    def serve(self, port: int) -> None:
        """Answer scrapes on a thread of their own, until the process ends."""
        start_http_server(port, registry=self.registry)
