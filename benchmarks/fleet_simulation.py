"""A fleet in simulation (benchmarks/fleet_model.py), and beside what `make bench-fleet` measured.

    python -m benchmarks.fleet_simulation [--measured bench-fleet.json] [--quick]

`loads` and `worst_p99_over_median`: as in benchmarks/fleet.py, for the same requests, by adapters x places x zipf and
by routing. With --measured, the last line of a `make bench-fleet`, the cost of a request on the processors comes from
its `ceiling_rps`, and `measured` holds its loads.

`sites`: by number of replicas, with 100 adapters for each: `loads` per 1,000 requests of homes and of the fewest in
flight, p50 and p99 of a request in seconds, and `choose_s`, what choosing all homes takes on this machine. Replicas
have 32 slots and 128 places, answers take 2 s on the mean and a load 0.3 s; requests fill half of the slots.

`flash_crowd`: an adapter that nobody asked for gets 30 % of all requests for a minute: p99 of its requests and of the
others' before, in each third of that minute and after, and its homes at the end of it. `region_lost`: half of the
replicas die at once and are away for a minute: `requests`, streams `cut`, `lost`, and p99 before, while and after.
"""

import argparse
import bisect
import itertools
import json
import random
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.fleet import AT_ONCE, REPLICAS, ROUTINGS, TIMES, requests_of
from benchmarks.fleet_model import Answered, Model, Site
from counsel.processor import processor
from serve.fleet.config import DEFAULT_HOME_IN_FLIGHT

# What benchmarks/fleet.py starts: `fleet_of`.
QUEUED = 512
SLOTS, PLACES, SERVICE_S, LOAD_S = 32, 128, 2.0, 0.3
ADAPTERS_PER_REPLICA = 100
CROWD_SHARE = 0.3


def main() -> None:
    """Run all parts; the last line of stdout is the JSON document."""
    parser = argparse.ArgumentParser(description="simulate a fleet's homes and front")
    parser.add_argument(
        "--measured", metavar="FILE", help="a document of benchmarks.fleet to fit to and to show beside"
    )
    parser.add_argument("--quick", action="store_true", help="a part of the grid, and up to 10 replicas")
    given = parser.parse_args()
    measured = json.loads(Path(given.measured).read_text().splitlines()[-1]) if given.measured else {}
    # The bench's clients, front and replicas share two cores.
    processor_s = 2 / measured["ceiling_rps"]["front"] if measured else 0.0
    document: dict[str, Any] = {"processor": str(processor()), "processor_s": round(processor_s, 5)}
    document["loads"], document["worst_p99_over_median"] = compare_routings(processor_s, given.quick)
    if measured:
        document["measured"] = {part: measured[part] for part in ("loads", "worst_p99_over_median")}
    sizes = (2, 10) if given.quick else (2, 10, 30, 100)
    document["sites"] = {str(n): _site(n) for n in sizes}
    document["flash_crowd"] = _flash_crowd(sizes[-1])
    document["region_lost"] = _region_lost(sizes[-1])
    print(json.dumps(document))


def compare_routings(
    processor_s: float, quick: bool
) -> tuple[dict[str, dict[str, float]], dict[str, dict[str, float]]]:
    """Loads per 1,000 requests, and the worst adapter's p99 over the median's, as benchmarks/fleet.py has them."""
    loads: dict[str, dict[str, float]] = defaultdict(dict)
    worst: dict[str, dict[str, float]] = defaultdict(dict)
    for name, n_adapters, places, models in requests_of(quick):
        for routing in ROUTINGS:
            slots, service_s, load_s = int(TIMES["slots"]), TIMES["service_s"], TIMES["load_s"]
            site = Site(
                REPLICAS, places, slots, service_s, load_s, DEFAULT_HOME_IN_FLIGHT, QUEUED, routing, processor_s
            )
            model = Model(site, [f"ad{number}" for number in range(n_adapters)])
            # The replicas start and load.
            model.env.run(until=30.0)
            first = len(models) // 5
            model.closed_loop(models[:first], AT_ONCE)
            before = model.loads
            model.closed_loop(models[first:], AT_ONCE)
            loads[name][routing] = round(1000 * (model.loads - before) / (len(models) - first), 1)
            worst[name][routing] = round(_worst_over_median(model.answered[first:]), 2)
        print(name, loads[name], worst[name], file=sys.stderr, flush=True)
    return loads, worst


class _Zipf:
    """Draws adapters, the first one most often."""

    def __init__(self, n: int, seed: int) -> None:
        self._sums = list(itertools.accumulate(1 / (rank + 1) for rank in range(n)))
        self._random = random.Random(seed)

    def __call__(self, at_s: float) -> str:
        return f"ad{bisect.bisect(self._sums, self._random.random() * self._sums[-1])}"


def _model(n: int, routing: str = "homes") -> tuple[Model, float]:
    """A site of `n` replicas, and the requests per second that fill half of it."""
    site = Site(n, PLACES, SLOTS, SERVICE_S, LOAD_S, DEFAULT_HOME_IN_FLIGHT, routing=routing, random_service=True)
    return Model(site, [f"ad{number}" for number in range(n * ADAPTERS_PER_REPLICA)]), 0.5 * n * SLOTS / SERVICE_S


def _site(n: int) -> dict[str, Any]:
    found: dict[str, Any] = {"loads": {}, "p50_s": {}, "p99_s": {}}
    for routing in ("homes", "leastconn"):
        model, rate = _model(n, routing)
        draw = _Zipf(len(model.ranks), seed=1)
        model.open_loop(rate, 60.0, draw)
        before = model.loads
        start_s = model.env.now
        model.open_loop(rate, 60.0, draw)
        asked = [one for one in model.answered if one.asked_s >= start_s]
        found["loads"][routing] = round(1000 * (model.loads - before) / len(asked), 1)
        found["p50_s"][routing], found["p99_s"][routing] = (_quantile(asked, q) for q in (0.5, 0.99))
        if routing == "homes":
            start_s = time.perf_counter()
            model.choose_anew()
            found["choose_s"] = round(time.perf_counter() - start_s, 3)
    print(f"{n} replicas: {found}", file=sys.stderr, flush=True)
    return found


def _flash_crowd(n: int) -> dict[str, Any]:
    model, rate = _model(n)
    usual, crowd = _Zipf(len(model.ranks) - 1, seed=2), f"ad{len(model.ranks) - 1}"
    chance = random.Random(3)
    model.open_loop(rate, 60.0, usual)
    model.open_loop(rate, 60.0, lambda at_s: crowd if chance.random() < CROWD_SHARE else usual(at_s))
    homes = len(model.keeper.told[crowd])
    model.open_loop(rate, 60.0, usual)
    times_s = ((20, 60), (60, 80), (80, 100), (100, 120), (120, 180))
    return {
        "replicas": n,
        "homes": homes,
        "p99_s": _by_time([one for one in model.answered if one.model == crowd], times_s),
        "others_p99_s": _by_time([one for one in model.answered if one.model != crowd], times_s),
        "lost": sum(one.outcome != "ok" for one in model.answered),
    }


def _region_lost(n: int) -> dict[str, Any]:
    model, rate = _model(n)
    draw = _Zipf(len(model.ranks), seed=4)
    model.open_loop(rate, 60.0, draw, streams=0.5)
    model.kill(list(model.replicas)[: n // 2], back_after_s=60.0)
    model.open_loop(rate, 120.0, draw, streams=0.5)
    outcomes = [one.outcome for one in model.answered]
    return {
        "replicas": n,
        "requests": len(outcomes),
        "cut": outcomes.count("cut"),
        "lost": outcomes.count("lost"),
        "p99_s": _by_time(model.answered, ((20, 55), (60, 80), (80, 120), (140, 180))),
    }


def _by_time(answered: Sequence[Answered], times_s: Sequence[tuple[int, int]]) -> dict[str, float | None]:
    def p99(start_s: int, end_s: int) -> float | None:
        asked = [one for one in answered if start_s <= one.asked_s < end_s]
        return _quantile(asked, 0.99) if asked else None

    return {f"{start_s}-{end_s}": p99(start_s, end_s) for start_s, end_s in times_s}


def _quantile(answered: Sequence[Answered], q: float) -> float:
    seconds = sorted(one.seconds for one in answered)
    return round(seconds[int(len(seconds) * q)], 2)


def _worst_over_median(answered: Sequence[Answered]) -> float:
    by_adapter: dict[str, list[float]] = defaultdict(list)
    for one in answered:
        by_adapter[one.model].append(one.seconds)
    p99 = [sorted(seconds)[int(len(seconds) * 0.99)] for seconds in by_adapter.values() if len(seconds) >= 20]
    return max(p99) / statistics.median(p99)


if __name__ == "__main__":
    main()
