"""The server's own view through the run: `/metrics`, read once a second beside the load, on the clock of the rows.

server.jsonl, one object a second: t_s (seconds after the start of the run, as in requests.jsonl) and, where the server
has them, the figures of SERIES. A server without /metrics, or that refuses it to this key, leaves the file empty and
the reason in a note: the run goes on.
"""

import json
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

from serve.client import API_KEY

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
COUNTERS = ("preemptions", "prefix_queries", "prefix_hits", "tokens", "loads", "unloads")
_SAMPLE = re.compile(r"^([a-zA-Z_:][\w:]*)(?:\{(.*)\})? (\S+)", re.MULTILINE)
# counsel_adapter_events_total carries what happened as a label.
_EVENTS = {"load": "loads", "unload": "unloads", "evict": "unloads"}
_EVERY_S = 1.0


def read_metrics(text: str) -> dict[str, float]:
    """The figures of SERIES in a Prometheus page, each summed over its labels."""
    found: dict[str, float] = {}
    for name, labels, value in _SAMPLE.findall(text):
        key = SERIES.get(name)
        if name == "counsel_adapter_events_total":
            event = re.search(r'event="(\w+)"', labels)
            key = _EVENTS.get(event[1]) if event else None
        if key is not None:
            found[key] = found.get(key, 0.0) + float(value)
    return found


class Scraper:
    """Reads `/metrics` in a thread from `start` to `stop`; `note` says why there is nothing."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self.url = f"{parts.scheme}://{parts.netloc}/metrics"
        self.note = ""
        self._samples: list[tuple[float, dict[str, float]]] = []
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
        lines = ({"t_s": round(mono_s - start_mono_s, 3), **found} for mono_s, found in self._samples)
        path.write_text("".join(json.dumps(line) + "\n" for line in lines if line["t_s"] >= -1), encoding="utf-8")

    def _run(self) -> None:
        key = os.environ.get(API_KEY)
        request = urllib.request.Request(self.url, headers={"Authorization": f"Bearer {key}"} if key else {})
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        while not self._stop.is_set():
            asked = time.monotonic()
            try:
                with opener.open(request, timeout=5) as response:
                    found = read_metrics(response.read().decode("utf-8", "replace"))
                self._samples.append(((asked + time.monotonic()) / 2, found))
            except urllib.error.HTTPError as error:
                # It will not change its mind: a page that is not there, or not for this key.
                self.note = f"{self.url} answered {error.code}"
                return
            except (OSError, ValueError) as error:
                # A busy or dying server: the gap in the samples says so.
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
