"""The homes of a fleet over time: measures the load, chooses homes by serve/fleet/homes.py, and says which are ready.

It reads no clock and asks no one: benchmarks/fleet_simulation.py runs it too.
"""

import math
from collections.abc import Collection, Mapping

from serve.fleet import homes
from serve.fleet.haproxy import Traffic
from serve.fleet.homes import Demand, Homes, Place

TURN_S = 0.5
# How often homes are chosen again when only the load has changed, and over how long the load is averaged.
LOAD_EVERY_S, LOAD_MEAN_S = 10.0, 15.0
# How long an adapter's earlier home answers while the new one loads it.
MOVE_WAIT_S = 10.0


class HomeKeeper:
    """`told`: adapter -> its homes as the front shall know them. `preloads`: replica -> what it loads unasked."""

    def __init__(self, bound: int) -> None:
        """bound: requests in flight at a home above which it is full."""
        self.bound = bound
        self.told: Homes = {}
        self.preloads: Homes = {}
        self._in_flight: dict[str, float] = {}
        self._rate: dict[str, float] = {}
        self._wanted: Homes = {}
        self._interim: Homes = {}
        self._moving_s: dict[str, float] = {}
        self._chosen_for: object = None
        self._chosen_s = 0.0

    def measure(self, traffic: Mapping[str, Traffic]) -> None:
        """Average over time what each adapter has in flight; called every TURN_S."""
        share = 1 - math.exp(-TURN_S / LOAD_MEAN_S)
        for name in {*traffic, *self._in_flight}:
            now = traffic[name].in_flight if name in traffic else 0
            self._in_flight[name] = mean = self._in_flight.get(name, 0.0) * (1 - share) + now * share
            if mean < 1e-3 and not now:
                del self._in_flight[name]
        self._rate = {name: seen.per_minute / 60 for name, seen in traffic.items()}

    def choose(self, ranks: Mapping[str, int], places: Mapping[str, Place], up: Collection[str], now_s: float) -> None:
        """Choose the homes anew when what can be served where has changed, and now and then for the load.

        ranks: of every adapter that is served. places: the replicas that may have homes; up: those that answer.
        """
        refused = {name: (place.refused, name in up) for name, place in places.items()}
        chosen_for = dict(ranks), refused
        if chosen_for == self._chosen_for and now_s - self._chosen_s < LOAD_EVERY_S:
            return
        self._chosen_for, self._chosen_s = chosen_for, now_s
        demands = {
            name: Demand(rank, self._rate.get(name, 0.0), self._in_flight.get(name, 0.0))
            for name, rank in ranks.items()
        }
        self._wanted = homes.place(demands, places, self._wanted, self.bound)
        # Where an adapter is at home while all its homes are down.
        places_up = {name: place for name, place in places.items() if name in up}
        self._interim = homes.place(demands, places_up, self.told, self.bound) if up else {}
        self.preloads = {**self.preloads, **homes.preloads(self._wanted, demands, places, self.preloads)}

    def tell(self, names: Collection[str], up: Mapping[str, Place], now_s: float) -> Homes:
        """The homes of these adapters that are up and ready; they are `told` from now on."""
        wanted = {}
        for name in names:
            at = tuple(home for home in self._wanted.get(name, ()) if home in up) or self._interim.get(name, ())
            if at:
                wanted[name] = at
        self._moving_s = {
            name: self._moving_s.get(name, now_s) for name, at in wanted.items() if self.told.get(name) != at
        }
        # Not for ever: the new home may have loaded it, and needed its place for another since.
        awaited = {
            replica: [name for name in listed if now_s - self._moving_s.get(name, now_s) < MOVE_WAIT_S]
            for replica, listed in self.preloads.items()
        }
        self.told = homes.routed(wanted, self.told, up, awaited)
        return self.told
