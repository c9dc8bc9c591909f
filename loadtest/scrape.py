"""The server's own view through the run: `/metrics`, read once a second beside the load, on the clock of the rows.

server.jsonl, one object a second: t_s (seconds after the start of the run, as in requests.jsonl) and, where the server
has them, the figures of SERIES, over all its engines: gauges added up, shares averaged, and of counters the growth
since the first sample, through any restart that sets them back to 0. A server without /metrics, or that refuses it to
this key, leaves the file empty and the reason in a note: the run goes on.
"""

import http.client
import math
import os
import re
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

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
SHARES = ("kv_used",)
COUNTERS = ("preemptions", "prefix_queries", "prefix_hits", "tokens", "loads", "unloads")
_SAMPLE = re.compile(r"^([a-zA-Z_:][\w:]*)(?:\{(.*)\})? (\S+)", re.MULTILINE)
# counsel_adapter_events_total carries what happened as a label.
_EVENTS = {"load": "loads", "unload": "unloads", "evict": "unloads"}
_EVERY_S = 1.0


# A figure of SERIES, and the labels of one of its series.
Series = tuple[str, str]


def read_metrics(text: str) -> dict[Series, float]:
    """The series of the figures of SERIES in a Prometheus page; one that is not a number says nothing."""
    found: dict[Series, float] = {}
    for name, labels, value in _SAMPLE.findall(text):
        key = SERIES.get(name)
        if name == "counsel_adapter_events_total":
            event = re.search(r'event="(\w+)"', labels)
            key = _EVENTS.get(event[1]) if event else None
        if key is not None and math.isfinite(number := float(value)):
            found[key, f"{name} {labels}"] = number
    return found


def over_engines(pages: Sequence[Mapping[Series, float]]) -> list[dict[str, float]]:
    """The figures of each page in turn: series added up, shares averaged, and of counters the growth since the first.

    A counter that falls was set back, and has grown by its value since; one that is new later began at 0.
    """
    figures: list[dict[str, float]] = []
    before = dict(pages[0]) if pages else {}
    grown: dict[str, float] = {}
    for page in pages:
        by_key: dict[str, list[float]] = {}
        for series, value in page.items():
            key = series[0]
            if key in COUNTERS:
                last = before.get(series, 0.0)
                grown[key] = grown.get(key, 0.0) + (value - last if value >= last else value)
                before[series] = value
            by_key.setdefault(key, []).append(value)
        totals = {key: sum(values) / (len(values) if key in SHARES else 1) for key, values in by_key.items()}
        figures.append({key: grown[key] if key in COUNTERS else total for key, total in totals.items()})
    return figures


class Scraper:
    """Reads `/metrics` in a thread from `start` to `stop`; `note` says why there is nothing."""

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
        """Write the samples from the start of the run on (see the module's docstring)."""
        pages = [(mono_s - start_mono_s, page) for mono_s, page in self._pages if mono_s - start_mono_s >= -1]
        figures = over_engines([page for _, page in pages])
        write_jsonl(path, ({"t_s": round(t_s, 3), **found} for (t_s, _), found in zip(pages, figures, strict=True)))

    def _run(self) -> None:
        key = os.environ.get(API_KEY)
        request = urllib.request.Request(self.url, headers={"Authorization": f"Bearer {key}"} if key else {})
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        while not self._stop.is_set():
            asked = time.monotonic()
            try:
                with opener.open(request, timeout=5) as response:
                    found = read_metrics(response.read().decode("utf-8", "replace"))
                self._pages.append(((asked + time.monotonic()) / 2, found))
            except urllib.error.HTTPError as error:
                # It will not change its mind: a page that is not there, or not for this key.
                self.note = f"{self.url} answered {error.code}"
                return
            except (OSError, http.client.HTTPException, ValueError) as error:
                # A busy or dying server, a page cut short: the gap in the samples says so.
                self.note = f"{self.url}: {error}"
            self._stop.wait(max(_EVERY_S - (time.monotonic() - asked), 0.05))


def server_figures(samples: Sequence[Mapping[str, Any]], note: str) -> dict[str, Any]:
    """Peak and mean of each gauge, growth of each counter over the run; `note` is why some of it may be missing."""
    found: dict[str, Any] = {"samples": len(samples), "note": note}
    for key in dict.fromkeys([*SERIES.values(), *COUNTERS]):
        values = [sample[key] for sample in samples if key in sample]
        if not values:
            continue
        if key in COUNTERS:
            found[key] = values[-1] - values[0]
        else:
            found[key] = {"mean": sum(values) / len(values), "max": max(values)}
    return found
