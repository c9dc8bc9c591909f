"""Publishes new versions of adapters during a run, so that the server swaps adapters that requests are using.

churn.jsonl has one published version per line: unix_s, model, version. If publishing fails, the last line has unix_s
and error, and the run is invalid. A new version is the current one with another system prompt. So its content differs
but its weights do not, and only the swap is measured.
"""

import contextlib
import json
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from counsel import store as adapter_store
from counsel.catalog import resolve
from counsel.errors import UserError
from counsel.files import read_json
from loadtest.scenario import Scenario


@contextlib.contextmanager
def churning(scenario: Scenario, directory: Path) -> Iterator[None]:
    """Publish a new version of each adapter in turn, every `churn_s`, until the block ends; nothing if it is 0."""
    if not scenario.churn_s:
        yield
        return
    target = read_json(directory / "target.json")
    store = Path(scenario.churn_store)
    names = [name for name in adapter_store.names(store) if name in target["models"]]
    if not names:
        raise UserError(
            f"churn_store {scenario.churn_store!r} has none of the models {', '.join(target['models'])}; "
            "give the store that the server uses"
        )
    stop = threading.Event()
    with ThreadPoolExecutor(max_workers=1) as pool:
        publishing = pool.submit(_publish, scenario.churn_s, store, names, directory, stop)
        try:
            yield
        finally:
            stop.set()
    publishing.result()


def _publish(every_s: float, store: Path, names: Sequence[str], directory: Path, stop: threading.Event) -> None:
    started_s = time.monotonic()
    count = 0
    with (directory / "churn.jsonl").open("w", encoding="utf-8") as file:
        while not stop.wait(max(started_s + (count + 1) * every_s - time.monotonic(), 0)):
            try:
                manifest = _publish_copy(store, names[count % len(names)], count)
            except UserError as error:
                # The load continues, so that its results are kept.
                file.write(json.dumps({"unix_s": time.time(), "error": str(error)}) + "\n")
                return
            file.write(json.dumps({"unix_s": time.time(), "model": manifest.name, "version": manifest.version}) + "\n")
            file.flush()
            count += 1


def _publish_copy(store: Path, name: str, count: int) -> adapter_store.Manifest:
    manifest = adapter_store.find(store, name)
    base, folder = resolve(manifest.base["hub_id"]), adapter_store.version_dir(store, manifest)
    system = f"{manifest.prompt['system'].split(' (load test')[0]} (load test {count})".strip()
    return adapter_store.publish(store, name, folder, base, system=system, run=manifest.run)
