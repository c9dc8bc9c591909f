"""The server's metrics per adapter."""

from prometheus_client import generate_latest

from serve.metrics import ServerMetrics
from serve.token_counts import Tally, TokenCounts
from tests.tiny import tiny_manifest


def test_no_series_of_a_removed_version_comes_back():
    """A request that ends after the removal, and a load that fails after it, are not counted."""
    metrics = ServerMetrics()
    manifest = tiny_manifest("removed-in-a-test")

    def series() -> list[str]:
        return [line for line in generate_latest().decode().splitlines() if manifest.id in line]

    metrics.adapter_event("load", manifest, 0.1)
    assert series()
    metrics.adapter_event("gone", manifest, 0.0)
    metrics.adapter_event("unload", manifest, 0.0)
    metrics.adapter_event("fail", manifest, 0.0)
    metrics.answered(manifest.id, 200, Tally(answers={("r", 0): TokenCounts(2, 0.1, 0.2)}), 0.1, streamed=True)
    assert series() == []
