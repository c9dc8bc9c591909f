"""Prometheus metrics per adapter, on the registry that vLLM's own `/metrics` shows."""

from prometheus_client import Counter, Gauge, Histogram

from counsel.store import Manifest
from serve.token_counts import Tally

_FIRST_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_TOKEN_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)


class ServerMetrics:
    """This project's own metrics; the label `adapter` is the exact served name, or the base's."""

    def __init__(self) -> None:
        self.requests = Counter("counsel_requests", "requests answered", ["adapter", "status"])
        self.refusals = Counter("counsel_refusals", "requests refused at the gateway", ["status", "code"])
        self.prompt_tokens = Counter("counsel_prompt_tokens", "tokens read", ["adapter"])
        self.completion_tokens = Counter("counsel_completion_tokens", "tokens generated", ["adapter"])
        self.ttft_s = Histogram(
            "counsel_ttft_seconds", "time to first token, of streams", ["adapter"], buckets=_FIRST_S
        )
        self.token_s = Histogram(
            "counsel_time_per_output_token_seconds",
            "time per output token after the first, of each answer of a stream",
            ["adapter"],
            buckets=_TOKEN_S,
        )
        self.in_flight = Gauge("counsel_sequences_in_flight", "sequences admitted and not finished")
        self.loaded = Gauge("counsel_adapter_resident", "1 while an adapter is in the engine", ["adapter"])
        self.events = Counter("counsel_adapter_events", "load, unload, evict, fail", ["adapter", "event"])
        self.load_s = Histogram("counsel_adapter_load_seconds", "from requested to servable", buckets=_FIRST_S)
        self._removed: set[str] = set()

    def adapter_event(self, event: str, manifest: Manifest, seconds: float) -> None:
        """Count what the pool did with an adapter; drop every series of one that is gone from the store."""
        if event == "gone":
            by_adapter = (
                self.requests,
                self.prompt_tokens,
                self.completion_tokens,
                self.ttft_s,
                self.token_s,
                self.events,
            )
            for metric in by_adapter:
                metric.remove_by_labels({"adapter": manifest.id})
            self._removed.add(manifest.id)
            return
        if event == "load":
            self._removed.discard(manifest.id)
        if manifest.id not in self._removed:  # what ends after the removal must not create the series again
            self.events.labels(manifest.id, event).inc()
        if event == "load":
            self.load_s.observe(seconds)
            self.loaded.labels(manifest.id).set(1)
        elif event in ("unload", "evict"):
            self.loaded.remove(manifest.id)

    def answered(self, adapter: str, status: int, tally: Tally, ttft_s: float | None, streamed: bool) -> None:
        """Count one answered request and what the engine did for it, to the end or until the client disconnected."""
        if adapter in self._removed:
            return
        self.requests.labels(adapter, str(status)).inc()
        self.prompt_tokens.labels(adapter).inc(tally.prompt_tokens)
        self.completion_tokens.labels(adapter).inc(tally.completion_tokens)
        if not streamed or ttft_s is None:
            return
        self.ttft_s.labels(adapter).observe(ttft_s)
        for answer in tally.answers.values():
            if answer.n_tokens > 1:
                self.token_s.labels(adapter).observe((answer.last_s - answer.first_s) / (answer.n_tokens - 1))
