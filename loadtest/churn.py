"""Publishes new versions of adapters while the load runs, so that the server swaps what requests are using.

churn.jsonl, one publication a line: unix_s, model, version; where it could not go on, last: unix_s, error, and the run
is invalid. A new version is the adapter that is current, with a system text of its own, so its content differs and its
weights do not: what is measured is the swap.
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
    """Publish a new version of each adapter in turn, every `churn_s`, until the block ends; nothing without it."""
    if not scenario.churn_s:
        yield
        return
    target = read_json(directory / "target.json")
    store = Path(scenario.churn_store)
    names = [name for name in adapter_store.names(store) if name in target["models"]]
    if not names:
        raise UserError(f"churn_store {scenario.churn_store!r} holds none of the models {', '.join(target['models'])}")
    stop = threading.Event()
    with ThreadPoolExecutor(max_workers=1) as pool:
        publishing = pool.submit(_publish, scenario.churn_s, store, names, directory, stop)
        try:
            yield
        finally:
            stop.set()
    publishing.result()


def _publish(every_s: float, store: Path, names: Sequence[str], directory: Path, stop: threading.Event) -> None:
    begun = time.monotonic()
    count = 0
    with (directory / "churn.jsonl").open("w", encoding="utf-8") as file:
        while not stop.wait(max(begun + (count + 1) * every_s - time.monotonic(), 0)):
            try:
                manifest = _publish_again(store, names[count % len(names)], count)
            except UserError as error:
                # The load goes on: what it showed so far is worth keeping.
                file.write(json.dumps({"unix_s": time.time(), "error": str(error)}) + "\n")
                return
            file.write(json.dumps({"unix_s": time.time(), "model": manifest.name, "version": manifest.version}) + "\n")
            file.flush()
            count += 1


def _publish_again(store: Path, name: str, count: int) -> adapter_store.Manifest:
    manifest = adapter_store.find(store, name)
    base, folder = resolve(manifest.base["hub_id"]), adapter_store.version_dir(store, manifest)
    system = f"{manifest.prompt['system'].split(' (load test')[0]} (load test {count})".strip()
    return adapter_store.publish(store, name, folder, base, system=system, run=manifest.run)
