"""The server's own metrics during a run: `/metrics` is read once per second, on the same clock as the requests.

server.jsonl has one object per second: t_s (seconds after the start of the run, as in requests.jsonl) and the metrics
of SERIES that the server has, over all its engines. Gauges are summed and shares are averaged. Counters hold the growth
since the first sample, also across a restart that resets them to 0. If the server has no /metrics or refuses this key,
the file is empty, a note says why, and the run continues.
"""

import http.client
import math
import os
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from prometheus_client.parser import text_string_to_metric_families

from counsel.client import API_KEY
from counsel.files import write_jsonl

SERIES = {
    "vllm:num_requests_running": "running",
    "vllm:num_requests_waiting": "waiting",
    "vllm:kv_cache_usage_perc": "kv_used",
    "vllm:num_preemptions_total": "preemptions",
    "vllm:prefix_cache_queries_total": "prefix_queries",
    "vllm:prefix_cache_hits_total": "prefix_hits",
    "vllm:generation_tokens_total": "tokens",
    "counsel_adapter_resident": "adapters",
}
# Counts loads and unloads in one series, with the event as a label.
_EVENTS_SERIES = "counsel_adapter_events_total"
_EVENTS = {"load": "loads", "unload": "unloads", "evict": "unloads"}
SHARES = ("kv_used",)
COUNTERS = ("preemptions", "prefix_queries", "prefix_hits", "tokens", "loads", "unloads")
_INTERVAL_S = 1.0

# A metric of server.jsonl, and the name and labels of one of its series.
Series = tuple[str, str, frozenset[tuple[str, str]]]


def read_metrics(text: str) -> dict[Series, float]:
    """The series of SERIES in a Prometheus page, without values that are not finite. Raises ValueError if cut short."""
    series: dict[Series, float] = {}
    for family in text_string_to_metric_families("\n".join(_wanted_lines(text))):
        for name, labels, value, *_ in family.samples:
            key = _EVENTS.get(labels.get("event", "")) if name == _EVENTS_SERIES else SERIES.get(name)
            if key is not None and math.isfinite(value):
                series[key, name, frozenset(labels.items())] = value
    return series


def _wanted_lines(text: str) -> Iterator[str]:
    """The lines that are read. Parsing a whole page of a server with 64 adapters takes 40 ms, 4 % of a core."""
    wanted = (*SERIES, _EVENTS_SERIES)
    return (line for line in text.split("\n") if line.startswith(wanted))


def merge_engines(pages: Sequence[Mapping[Series, float]]) -> list[dict[str, float]]:
    """The metrics of each page: gauges summed, shares averaged, counters as growth since the first page.

    A counter that falls was reset, and has grown by its new value. A series that appears later started at 0.
    """
    samples: list[dict[str, float]] = []
    last = dict(pages[0]) if pages else {}
    growth: dict[str, float] = {}
    for page in pages:
        by_key: dict[str, list[float]] = {}
        for series, value in page.items():
            key = series[0]
            if key in COUNTERS:
                before = last.get(series, 0.0)
                growth[key] = growth.get(key, 0.0) + (value - before if value >= before else value)
                last[series] = value
            by_key.setdefault(key, []).append(value)
        totals = {key: sum(values) / (len(values) if key in SHARES else 1) for key, values in by_key.items()}
        samples.append({key: growth[key] if key in COUNTERS else total for key, total in totals.items()})
    return samples


class Scraper:
    """Reads `/metrics` in a thread while the `with` block runs; `note` says why samples are missing."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self.url = f"{parts.scheme}://{parts.netloc}/metrics"
        self.note = ""
        self._pages: list[tuple[float, dict[Series, float]]] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="scraper", daemon=True)

    def __enter__(self) -> "Scraper":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(timeout=10)

    def write(self, path: Path, start_mono_s: float) -> None:
        """Write the samples since the start of the run (see the module's docstring)."""
        pages = [(mono_s - start_mono_s, page) for mono_s, page in self._pages if mono_s - start_mono_s >= -1]
        samples = merge_engines([page for _, page in pages])
        write_jsonl(path, ({"t_s": round(t_s, 3), **sample} for (t_s, _), sample in zip(pages, samples, strict=True)))

    def _run(self) -> None:
        key = os.environ.get(API_KEY)
        request = urllib.request.Request(self.url, headers={"Authorization": f"Bearer {key}"} if key else {})
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        while not self._stop.is_set():
            requested_s = time.monotonic()
            try:
                with opener.open(request, timeout=5) as response:
                    page = read_metrics(response.read().decode("utf-8", "replace"))
                self._pages.append(((requested_s + time.monotonic()) / 2, page))
            except urllib.error.HTTPError as error:
                # Asking again will not help: there is no such page, or not for this key.
                self.note = f"{self.url} answered {error.code}"
                return
            except (OSError, http.client.HTTPException, ValueError) as error:
                # The server is busy or dying, or the page was cut short: the samples have a gap.
                self.note = f"{self.url}: {error}"
            self._stop.wait(max(_INTERVAL_S - (time.monotonic() - requested_s), 0.05))


def server_metrics(samples: Sequence[Mapping[str, Any]], note: str) -> dict[str, Any]:
    """Mean and peak of each gauge and growth of each counter; `note` says why some may be missing."""
    metrics: dict[str, Any] = {"samples": len(samples), "note": note}
    for key in dict.fromkeys([*SERIES.values(), *COUNTERS]):
        values = [sample[key] for sample in samples if key in sample]
        if not values:
            continue
        if key in COUNTERS:
            metrics[key] = values[-1] - values[0]
        else:
            metrics[key] = {"mean": sum(values) / len(values), "max": max(values)}
    return metrics
