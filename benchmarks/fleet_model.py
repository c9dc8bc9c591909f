"""A fleet as a queueing model in simulated time: HAProxy's rules, the product's homes, and replicas that only wait.

Homes are chosen by the code that a fleet runs (serve/fleet/home_keeper.py), by the same clock. A replica is what
serve/adapter_pool.py and benchmarks/stand_in.py are: one load at a time, least recently used out, idle for SETTLE_S
first, then a slot for the time of an answer. HAProxy: the home while it is up and not full, else the fewest in flight;
another replica after a 503 or a death before the answer began, up to RETRIES times.

Not modelled: connections, bodies, the 30 s after which a load without room is given up, and health checks, which take
up to a second: a replica that dies is out at once, as the first failed request does it.
"""

import bisect
import hashlib
import itertools
import math
import random
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import simpy

from serve.adapter_pool import SETTLE_S
from serve.fleet.fleet import GONE_S
from serve.fleet.haproxy import Traffic
from serve.fleet.home_keeper import TURN_S, HomeKeeper
from serve.fleet.homes import Place

Steps = Generator[simpy.Event, Any, Any]
RETRIES = 3
_POLL_S = 0.05
_RING_POINTS = 64
_SPILL = 1.5


@dataclass(frozen=True)
class Site:
    """A fleet and its hardware. Times in seconds.

    places: adapters that a replica holds; slots: answers that it works on at a time; bound: requests in flight at a
    home that make it full; queued: requests in flight that make a replica refuse. processor_s: what each request costs
    on the `processors` that front, replicas and clients share; 0 where they share none. random_service: an answer takes
    an exponentially distributed time.
    """

    replicas: int
    places: int
    slots: int
    service_s: float
    load_s: float
    bound: int
    queued: int = 512
    routing: str = "homes"
    processor_s: float = 0.0
    processors: int = 2
    random_service: bool = False


class Answered(NamedTuple):
    """One request: when it was asked, its seconds, those of them before its slot, and `ok`, `cut` or `lost`."""

    model: str
    asked_s: float
    seconds: float
    waited_s: float
    outcome: str


@dataclass
class _Held:
    loading: simpy.Process
    in_flight: int = 0
    idle_since_s: float = 0.0


class _Engine:
    """What dies with a replica's process."""

    def __init__(self, env: simpy.Environment, site: Site, count: Callable[[], None]) -> None:
        self.env, self.site, self.count = env, site, count
        self.slots = simpy.Resource(env, site.slots)
        self.one_load = simpy.Resource(env, 1)
        self.held: dict[str, _Held] = {}
        self.listed: tuple[str, ...] = ()

    def loaded(self) -> frozenset[str]:
        return frozenset(name for name, held in self.held.items() if not held.loading.is_alive)

    def acquire(self, name: str) -> Steps:
        held = self.held.get(name)
        if held is None:
            held = self.held[name] = _Held(self.env.process(self._load()))
        held.in_flight += 1
        try:
            if held.loading.is_alive:
                yield held.loading
        except simpy.Interrupt:
            held.in_flight -= 1
            raise
        return held

    def release(self, held: _Held) -> None:
        held.in_flight -= 1
        held.idle_since_s = self.env.now

    def load_listed(self, listed: tuple[str, ...]) -> Steps:
        """Load what is new on the list, one after the other."""
        added, self.listed = [name for name in listed if name not in self.listed], listed
        for name in added:
            held = yield from self.acquire(name)
            self.release(held)

    def _load(self) -> Steps:
        with self.one_load.request() as turn:
            yield turn
            while sum(not held.loading.is_alive for held in self.held.values()) >= self.site.places:
                idle = [
                    (held.idle_since_s, name)
                    for name, held in self.held.items()
                    if not held.loading.is_alive and not held.in_flight and self.env.now - held.idle_since_s >= SETTLE_S
                ]
                if idle:
                    del self.held[min(idle)[1]]
                else:
                    yield self.env.timeout(_POLL_S)
            yield self.env.timeout(self.site.load_s)
        self.count()


class _Replica:
    def __init__(self, name: str, engine: _Engine) -> None:
        self.name, self.engine = name, engine
        self.up, self.seen_s, self.last_asked = True, 0.0, 0
        # The requests that it has, by their processes; whether their answers began.
        self.requests: dict[simpy.Process, bool] = {}


class Model:
    """A fleet in simulated time; `answered` and `loads` are what happened so far."""

    def __init__(self, site: Site, adapters: Iterable[str], seed: int = 0) -> None:
        self.env, self.site, self.random = simpy.Environment(), site, random.Random(seed)
        self.ranks = dict.fromkeys(adapters, 8)
        self.answered: list[Answered] = []
        self.loads = 0
        self.keeper = HomeKeeper(site.bound)
        self._processor = simpy.Resource(self.env, site.processors)
        self._numbers = itertools.count(1)
        self._in_flight: dict[str, int] = {}
        self._asked_s: dict[str, deque[float]] = {}
        self._told: dict[str, tuple[str, ...]] = {}
        self._rest = 0
        self.replicas = {f"r{n}": _Replica(f"r{n}", self._engine()) for n in range(1, site.replicas + 1)}
        self._ring = sorted((_point(f"{name}/{n}"), name) for name in self.replicas for n in range(_RING_POINTS))
        if site.routing == "homes":
            self._set_homes()
            self.env.process(self._keep_homes())
        else:
            # A lone server loads the newest adapters.
            for replica in self.replicas.values():
                self.env.process(replica.engine.load_listed(tuple(self.ranks)[-site.places :]))

    def request(self, model: str, stream: bool = False) -> Steps:
        """One request, from the front to its end. A model that is no adapter is the base."""
        asked_s, waited_s, outcome = self.env.now, 0.0, "lost"
        if self.site.processor_s:
            with self._processor.request() as turn:
                yield turn
                yield self.env.timeout(self.site.processor_s)
        self._count(model)
        failed = None
        for _ in range(1 + RETRIES):
            replica = self._route(model, failed)
            if replica is None:
                break
            failed = replica
            if len(replica.requests) >= self.site.queued:
                continue
            me = self.env.active_process
            assert me is not None
            replica.requests[me], replica.last_asked = False, next(self._numbers)
            try:
                waited_s = (yield from self._answer(replica, model, me)) - asked_s
                outcome = "ok"
                break
            except simpy.Interrupt:
                if replica.requests.get(me) and stream:
                    outcome = "cut"
                    break
            finally:
                replica.requests.pop(me, None)
        if model in self.ranks:
            self._in_flight[model] -= 1
        self.answered.append(Answered(model, asked_s, self.env.now - asked_s, waited_s, outcome))

    def closed_loop(self, models: Sequence[str], at_once: int) -> None:
        """Ask for these, so many at a time, and return when all are answered."""
        waiting = iter(models)

        def worker() -> Steps:
            for model in waiting:
                yield self.env.process(self.request(model))

        self.env.run(simpy.AllOf(self.env, [self.env.process(worker()) for _ in range(at_once)]))

    def open_loop(self, rate: float, seconds: float, draw: Callable[[float], str], streams: float = 0.0) -> None:
        """Poisson arrivals; draw: the model that is asked for at a time. Returns when the last has arrived."""
        until_s = self.env.now + seconds

        def arrive() -> Steps:
            while True:
                yield self.env.timeout(self.random.expovariate(rate))
                if self.env.now >= until_s:
                    return
                self.env.process(self.request(draw(self.env.now), self.random.random() < streams))

        self.env.run(self.env.process(arrive()))

    def kill(self, names: Iterable[str], back_after_s: float) -> None:
        """End these replicas now; they come back with their homes loaded."""
        for replica in map(self.replicas.__getitem__, names):
            replica.up = False
            for request in list(replica.requests):
                request.interrupt()
            self.env.process(self._bring_back(replica, back_after_s))

    def choose_anew(self) -> None:
        """Choose all homes once, whatever has changed since."""
        places = {name: Place(self.site.places, replica.engine.loaded()) for name, replica in self.replicas.items()}
        self.keeper.choose(self.ranks, places, places, math.inf)

    def _bring_back(self, replica: _Replica, after_s: float) -> Steps:
        yield self.env.timeout(after_s)
        replica.engine = self._engine()
        yield from replica.engine.load_listed(self.keeper.preloads.get(replica.name, ()))
        replica.up = True

    def _engine(self) -> _Engine:
        return _Engine(self.env, self.site, self._count_load)

    def _count_load(self) -> None:
        self.loads += 1

    def _answer(self, replica: _Replica, model: str, me: simpy.Process) -> Steps:
        """When its slot was free."""
        engine = replica.engine
        held = (yield from engine.acquire(model)) if model in self.ranks else None
        try:
            with engine.slots.request() as slot:
                yield slot
                begun_s = self.env.now
                replica.requests[me] = True
                mean_s = self.site.service_s
                yield self.env.timeout(self.random.expovariate(1 / mean_s) if self.site.random_service else mean_s)
        finally:
            if held is not None:
                engine.release(held)
        return begun_s

    def _route(self, model: str, failed: _Replica | None) -> _Replica | None:
        up = [replica for replica in self.replicas.values() if replica.up and replica is not failed]
        if not up:
            return failed if failed is not None and failed.up else None
        routing = self.site.routing
        if routing == "homes" and failed is None and (homes := self._told.get(model)):
            home = self.replicas[homes[self.random.randrange(len(homes))]]
            if home.up and len(home.requests) < self.site.bound:
                return home
        if routing == "roundrobin":
            self._rest += 1
            return up[self._rest % len(up)]
        if routing == "hash":
            return self._hashed(model, up)
        return min(up, key=lambda replica: (len(replica.requests), replica.last_asked))

    def _hashed(self, model: str, up: list[_Replica]) -> _Replica:
        most = math.ceil(_SPILL * (sum(len(replica.requests) for replica in up) + 1) / len(up))
        able = {replica.name for replica in up if len(replica.requests) < most}
        start = bisect.bisect(self._ring, (_point(model), ""))
        for _, name in itertools.chain(self._ring[start:], self._ring[:start]):
            if name in able:
                return self.replicas[name]
        return up[0]

    def _count(self, model: str) -> None:
        if model in self.ranks:
            self._in_flight[model] = self._in_flight.get(model, 0) + 1
            self._asked_s.setdefault(model, deque()).append(self.env.now)

    def _traffic(self) -> dict[str, Traffic]:
        traffic = {}
        for name, times_s in self._asked_s.items():
            while times_s and times_s[0] < self.env.now - 60:
                times_s.popleft()
            traffic[name] = Traffic(self._in_flight[name], len(times_s))
        return traffic

    def _keep_homes(self) -> Steps:
        while True:
            yield self.env.timeout(TURN_S)
            self.keeper.measure(self._traffic())
            self._set_homes()

    def _set_homes(self) -> None:
        now_s = self.env.now
        for replica in self.replicas.values():
            if replica.up:
                replica.seen_s = now_s
        places = {
            replica.name: Place(self.site.places, replica.engine.loaded())
            for replica in self.replicas.values()
            if now_s - replica.seen_s < GONE_S
        }
        up = {name: place for name, place in places.items() if self.replicas[name].up}
        self.keeper.choose(self.ranks, places, up, now_s)
        for name in up:
            engine, listed = self.replicas[name].engine, self.keeper.preloads.get(name, ())
            if listed != engine.listed:
                self.env.process(engine.load_listed(listed))
        self._told = self.keeper.tell(self.ranks, up, now_s) if up else {}


def _point(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8])
