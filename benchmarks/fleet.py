"""A fleet's front and homes, with replicas whose engine only waits (benchmarks/stand_in.py).

    python -m benchmarks.fleet [--quick]

`added_ms`: milliseconds that the front adds to a request, p50 and p99, from pairs of one request to a replica and one
through the front, alternately. `ceiling_rps`: requests/s through the front, and around it to one replica.

`loads`: adapter loads per 1,000 requests, for each number of adapters, of places per replica and each zipf exponent,
under `homes`, `roundrobin`, `leastconn` and `hash` (consistent hashing on the name, spilling at 150 % of the mean). All
four get the same requests in the same order, one routing after the other on a fleet that starts anew; the loads of the
first fifth of the requests are not counted. `worst_p99_over_median`: the highest p99 of an adapter with 20 requests or
more, over the median adapter's p99, of the same runs.

`lost`: requests lost per fault, at a fixed rate of requests of which half stream: `cut` streams had begun when their
replica was killed, `lost` is everything else. The faults: kill -9 of a replica, SIGTERM to a replica, SIGSTOP for a
while (it hangs), a queue that is full for a while (its replica answers 503), a store that is away for a while, kill -9
of the front.
"""

import argparse
import asyncio
import contextlib
import json
import os
import random
import re
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx

from benchmarks.stand_in import COMMAND, ENVIRONMENT, put_in_store
from counsel.processor import processor
from serve.fleet.config import FleetConfig
from serve.fleet.fleet import CONFIG, Fleet
from serve.fleet.home_keeper import TURN_S

REPLICAS = 4
CHAT = "/v1/chat/completions"
ROUTINGS = ("homes", "roundrobin", "leastconn", "hash")
# Stated service times: an answer and a load, in seconds, and the answers that one replica works on at a time.
TIMES = {"service_s": 0.02, "load_s": 0.05, "slots": 16}
AT_ONCE = 16


class Asked(NamedTuple):
    """One request: what it asked for, its seconds, and `ok`, `cut` (a stream that had begun) or what went wrong."""

    model: str
    seconds: float
    outcome: str


def main() -> None:
    """Run all parts; the last line of stdout is the JSON document."""
    parser = argparse.ArgumentParser(description="measure a fleet's front, homes and losses with stand-in engines")
    parser.add_argument("--quick", action="store_true", help="fewer requests, adapters, places and exponents")
    quick = parser.parse_args().quick
    document: dict[str, Any] = {
        "processor": str(processor()),
        "replicas": REPLICAS,
        "stand_in": TIMES,
        "at_once": AT_ONCE,
    }
    document |= asyncio.run(_front_cost(200 if quick else 1000))
    document["loads"], document["worst_p99_over_median"] = _compare_routings(quick)
    document["lost"] = asyncio.run(_faults(rate=40, seconds=8.0 if quick else 20.0))
    print(json.dumps(document))


@contextlib.contextmanager
def fleet_of(
    n_adapters: int, places: int, replicas: int = REPLICAS, routing: str = "homes", queued: int = 512, **times: float
) -> Iterator[Fleet]:
    """A fleet of stand-ins, under one of ROUTINGS, once all are up."""
    os.environ[ENVIRONMENT] = json.dumps({**TIMES, **times})
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "store"
        for number in range(n_adapters):
            put_in_store(store, f"ad{number}")
        config = FleetConfig(replicas=replicas, port=0, store=str(store), logs=str(Path(folder) / "logs"), leave_s=2.0,
                             max_loras=min(8, places), max_cpu_loras=places, key_running=256,
                             queued=queued)  # fmt: skip
        fleet = Fleet(config, COMMAND)
        if routing != "homes":
            _without_homes(fleet, routing)
        with fleet:
            until_up(fleet, replicas)
            yield fleet


def _without_homes(fleet: Fleet, routing: str) -> None:
    """Another balance in the same configuration, and replicas that load the newest adapters, as a lone server does."""
    text = (fleet.folder / CONFIG).read_text()
    text = re.sub(r"  http-request (set-var\(txn.(home|draw)\)|track-sc0).*\n|  use-server .*\n", "", text)
    balance = {"hash": "hash var(txn.model)\n  hash-type consistent\n  hash-balance-factor 150"}.get(routing, routing)
    (fleet.folder / CONFIG).write_text(text.replace("balance leastconn", f"balance {balance}"))
    for replica in fleet.replicas:
        path = fleet.folder / f"{replica.name}.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "preload": ""}))


def until_up(fleet: Fleet, n: int) -> None:
    """Let the fleet work until `n` replicas are up."""
    while True:
        fleet.turn()
        with contextlib.suppress(OSError):
            if sum(state.status == "UP" for state in fleet.haproxy.servers().values()) == n:
                return
        time.sleep(0.1)


async def _turning(fleet: Fleet) -> None:
    """The fleet's own loop, beside the load."""
    while True:
        fleet.turn()
        await asyncio.sleep(TURN_S)


async def _ask(client: httpx.AsyncClient, url: str, model: str, stream: bool = False, text: str = "hi") -> Asked:
    body = {"model": model, "messages": [{"role": "user", "content": text}], "stream": stream}
    start_s, begun, parts = time.perf_counter(), False, b""
    try:
        async with client.stream("POST", url + CHAT, json=body) as reply:
            begun = stream and reply.status_code == 200
            async for part in reply.aiter_raw():
                parts += part
            whole = not stream or parts.endswith(b"[DONE]\n\n")
            outcome = "ok" if reply.status_code == 200 and whole else "cut" if begun else str(reply.status_code)
    except httpx.HTTPError as error:
        outcome = "cut" if begun else type(error).__name__
    return Asked(model, time.perf_counter() - start_s, outcome)


def _client() -> httpx.AsyncClient:
    return httpx.AsyncClient(timeout=60.0, limits=httpx.Limits(max_connections=None, max_keepalive_connections=0))


async def _front_cost(n: int) -> dict[str, Any]:
    with fleet_of(1, 4, replicas=1, service_s=0.0, load_s=0.0, slots=256) as fleet:
        direct, front = f"http://{fleet.replicas[0].address}", fleet.base_url.removesuffix("/v1")
        async with _client() as client:
            pairs = [[(await _ask(client, url, "ad0")).seconds for url in (direct, front)] for _ in range(n)]
            added_ms = sorted((through - around) * 1e3 for around, through in pairs)
            rates: dict[str, list[float]] = {"front": [], "replica": []}
            for _ in range(3):
                for name, url in (("replica", direct), ("front", front)):
                    start_s = time.perf_counter()
                    await _closed_loop(client, url, ["ad0"] * n, AT_ONCE)
                    rates[name].append(n / (time.perf_counter() - start_s))
    return {
        "added_ms": {
            "p50": round(statistics.median(added_ms), 2),
            "p99": round(added_ms[int(len(added_ms) * 0.99)], 2),
        },
        "added_n": n,
        "ceiling_rps": {name: round(statistics.median(rate)) for name, rate in rates.items()},
    }


async def _closed_loop(client: httpx.AsyncClient, url: str, models: list[str], at_once: int) -> list[Asked]:
    waiting = iter(models)

    async def worker() -> list[Asked]:
        return [await _ask(client, url, model) for model in waiting]

    return [asked for each in await asyncio.gather(*(worker() for _ in range(at_once))) for asked in each]


def requests_of(quick: bool) -> Iterator[tuple[str, int, int, list[str]]]:
    """Each case's name, number of adapters, places per replica, and whom its requests ask."""
    n = 500 if quick else 2000
    cases = [(a, p, z) for a in (8, 64, 512) for p in (4, 8, 16) for z in (0.8, 1.0, 1.2)]
    if quick:
        cases = [(8, 4, 1.0), (64, 8, 0.8), (64, 8, 1.2), (512, 16, 1.0)]
    for n_adapters, places, zipf in cases:
        weights = [1 / (rank + 1) ** zipf for rank in range(n_adapters)]
        models = random.Random(7).choices([f"ad{number}" for number in range(n_adapters)], weights, k=n)
        yield f"{n_adapters}x{places}x{zipf}", n_adapters, places, models


def _compare_routings(quick: bool) -> tuple[dict[str, dict[str, float]], dict[str, dict[str, float]]]:
    loads: dict[str, dict[str, float]] = {}
    worst: dict[str, dict[str, float]] = {}
    for name, n_adapters, places, models in requests_of(quick):
        n = len(models)
        loads[name], worst[name] = {}, {}
        for routing in ROUTINGS:
            with fleet_of(n_adapters, places, routing=routing) as fleet:
                n_loads, asked = asyncio.run(_routed(fleet, models))
            loads[name][routing] = round(1000 * n_loads / (n - n // 5), 1)
            worst[name][routing] = round(_worst_over_median(asked), 2)
        print(name, loads[name], worst[name], file=sys.stderr, flush=True)
    return loads, worst


async def _routed(fleet: Fleet, models: list[str]) -> tuple[int, list[Asked]]:
    """The loads, and what was asked, after the first fifth of the requests."""
    first = len(models) // 5
    url = fleet.base_url.removesuffix("/v1")
    async with _client() as client:
        turning = asyncio.create_task(_turning(fleet))
        await _closed_loop(client, url, models[:first], AT_ONCE)
        before = await _loads(client, fleet)
        asked = await _closed_loop(client, url, models[first:], AT_ONCE)
        after = await _loads(client, fleet)
        turning.cancel()
    failed = Counter(one.outcome for one in asked if one.outcome != "ok")
    if failed:
        print(f"failed: {dict(failed)}", file=sys.stderr, flush=True)
    return after - before, asked


async def _loads(client: httpx.AsyncClient, fleet: Fleet) -> int:
    texts = [(await client.get(f"http://{replica.private}/metrics")).text for replica in fleet.replicas]
    pattern = r'counsel_adapter_events_total\{[^}]*event="load"\} ([0-9.e+]+)'
    return round(sum(float(value) for text in texts for value in re.findall(pattern, text)))


def _worst_over_median(asked: list[Asked]) -> float:
    by_adapter: dict[str, list[float]] = defaultdict(list)
    for one in asked:
        by_adapter[one.model].append(one.seconds)
    p99 = [sorted(seconds)[int(len(seconds) * 0.99)] for seconds in by_adapter.values() if len(seconds) >= 20]
    return max(p99) / statistics.median(p99)


async def _faults(rate: int, seconds: float) -> dict[str, dict[str, int]]:
    """Each fault in turn, on one fleet."""
    found: dict[str, dict[str, int]] = {}
    queued = 64
    with fleet_of(16, 8, replicas=3, queued=queued, service_s=0.3) as fleet:

        def victim() -> int:
            return next(replica.kept.pid for replica in fleet.replicas if replica.kept and replica.kept.pid)

        async def kill_replica() -> None:
            os.kill(victim(), signal.SIGKILL)

        async def stop_replica() -> None:
            os.kill(victim(), signal.SIGTERM)

        async def hang() -> None:
            pid = victim()
            os.kill(pid, signal.SIGSTOP)
            await asyncio.sleep(seconds / 2)
            os.kill(pid, signal.SIGCONT)

        async def full_queue() -> None:
            go = Path(fleet.config.store).with_name("go")
            url = f"http://{fleet.replicas[0].address}"
            async with _client() as client:
                filling = [asyncio.create_task(_ask(client, url, "ad0", text=f"hold {go}")) for _ in range(queued)]
                await asyncio.sleep(seconds / 2)
                go.touch()
                await asyncio.gather(*filling)

        async def no_store() -> None:
            store = Path(fleet.config.store)
            store.rename(store.with_name("away"))
            await asyncio.sleep(seconds / 4)
            store.with_name("away").rename(store)

        async def kill_front() -> None:
            assert fleet.front.pid is not None
            os.kill(fleet.front.pid, signal.SIGKILL)

        faults: dict[str, Callable[[], Coroutine[Any, Any, None]]] = {
            "kill_replica": kill_replica, "sigterm_replica": stop_replica, "hang": hang, "full_queue": full_queue,
            "no_store": no_store, "kill_front": kill_front,
        }  # fmt: skip
        for name, fault in faults.items():
            until_up(fleet, 3)
            found[name] = await _under_load(fleet, rate, seconds, fault)
            print(name, found[name], file=sys.stderr, flush=True)
    return found


async def _under_load(
    fleet: Fleet, rate: int, seconds: float, fault: Callable[[], Coroutine[Any, Any, None]]
) -> dict[str, int]:
    """Requests at a fixed rate for a while, with the fault after a quarter of it."""
    url, tasks = fleet.base_url.removesuffix("/v1"), []
    async with _client() as client:
        turning = asyncio.create_task(_turning(fleet))
        start_s = time.monotonic()
        faulty: asyncio.Task[None] | None = None
        for number in range(int(rate * seconds)):
            await asyncio.sleep(max(0.0, start_s + number / rate - time.monotonic()))
            if faulty is None and number > rate * seconds / 4:
                faulty = asyncio.create_task(fault())
            tasks.append(asyncio.create_task(_ask(client, url, f"ad{number % 16}", stream=number % 2 == 0)))
        asked = await asyncio.gather(*tasks)
        if faulty is not None:
            await faulty
        turning.cancel()
    outcomes = Counter(one.outcome for one in asked)
    lost = {outcome: n for outcome, n in outcomes.items() if outcome not in ("ok", "cut")}
    if lost:
        print(f"lost: {lost}", file=sys.stderr, flush=True)
    return {"requests": len(asked), "cut": outcomes["cut"], "lost": sum(lost.values())}


if __name__ == "__main__":
    main()
