"""Which replica is home to which adapter. Pure: what is served, where, and how busy, in; adapter -> homes out.

Requests of an adapter go to its homes, so that it is loaded there once and not everywhere. The rules, in this order:

- a home can serve the adapter: its replica is up and does not refuse it;
- what has a home keeps it. It moves only when the home is gone or refuses it, when its replica is home to more
  adapters than it has places for while another has room, or when its replica has more in flight than a home may have;
- an adapter with more in flight than one home may have gets another home, and loses it only at half of that;
- among replicas with room the one that has it loaded is taken, then one with adapters of a similar rank, because the
  largest rank in a batch decides how long the batch takes, then the one with the fewest adapters and requests.
"""

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

Homes = dict[str, tuple[str, ...]]

# A home is full at `bound` requests in flight. A further home is added when one would be this full, and taken away
# when the others would be half as full.
_FILLED = 0.75
# How much more than its share a replica may have before adapters move away from it.
_SLACK = 1.25


@dataclass(frozen=True)
class Demand:
    """What is asked of one adapter: its requests per second and its mean number of requests in flight."""

    rank: int
    rate: float = 0.0
    in_flight: float = 0.0


@dataclass(frozen=True)
class Place:
    """One replica that is up: how many adapters it holds, which it has loaded, and which it cannot serve.

    loaded is None where that is unknown.
    """

    places: int
    loaded: frozenset[str] | None = frozenset()
    refused: frozenset[str] = frozenset()


def place(demands: Mapping[str, Demand], replicas: Mapping[str, Place], before: Mapping[str, tuple[str, ...]],
          bound: int) -> Homes:  # fmt: skip
    """The homes of each adapter; none for one that no replica can serve. bound: requests in flight at a home."""
    plan, n = _Plan(demands, replicas, bound), {}
    for name in sorted(demands):
        able = plan.able(name)
        kept = [home for home in before.get(name, ()) if home in able]
        n[name] = plan.wanted(name, len(before.get(name, ())))
        plan.put(name, tuple(kept[: n[name]]))
    share = math.ceil(sum(n.values()) / max(1, len(replicas)))
    # The busiest first: they decide how even it gets. Of equally busy ones those of one rank follow each other.
    order = sorted(demands, key=lambda name: (-demands[name].in_flight, -demands[name].rate, -demands[name].rank, name))
    for name in order:
        while len(plan.homes[name]) < n[name]:
            plan.put(name, (*plan.homes[name], plan.best(name, share)))
    plan.even_out()
    return {name: tuple(homes) for name, homes in plan.homes.items() if homes}


def routed(wanted: Mapping[str, tuple[str, ...]], mapped: Mapping[str, tuple[str, ...]],
           replicas: Mapping[str, Place], preloads: Mapping[str, Collection[str]]) -> Homes:  # fmt: skip
    """The homes that the front is told: a new home once it has loaded the adapter, until then those it had.

    Nothing is waited for where no earlier home can answer, or where the new home does not load it ahead of requests.
    """
    told: Homes = {}
    for name, homes in wanted.items():
        ready = tuple(home for home in homes if _is_ready(name, replicas[home], preloads.get(home, ())))
        had = tuple(home for home in mapped.get(name, ()) if home in replicas and name not in replicas[home].refused)
        told[name] = homes if len(ready) == len(homes) or not had else ready or had
    return told


def preloads(wanted: Mapping[str, tuple[str, ...]], demands: Mapping[str, Demand], replicas: Mapping[str, Place],
             before: Mapping[str, tuple[str, ...]]) -> Homes:  # fmt: skip
    """Replica -> the adapters that it loads ahead of requests, as many as it has places for.

    A list changes only with the homes: a full one takes an adapter that is being asked for, in place of the one that is
    asked for least.
    """
    lists: Homes = {}
    for replica, room in replicas.items():
        at_home = {name for name, homes in wanted.items() if replica in homes}
        kept = [name for name in before.get(replica, ()) if name in at_home][: room.places]
        for name in sorted(at_home - set(kept), key=lambda name: (-demands[name].rate, name)):
            if len(kept) < room.places:
                kept.append(name)
                continue
            least = min(kept, key=lambda name: (demands[name].rate, name))
            if demands[name].rate > demands[least].rate and name not in before.get(replica, ()):
                kept[kept.index(least)] = name
        lists[replica] = tuple(kept)
    return lists


def _is_ready(name: str, replica: Place, preloaded: Collection[str]) -> bool:
    return replica.loaded is None or name in replica.loaded or name not in preloaded


class _Plan:
    """Homes while they are being chosen, and what each replica has of them."""

    def __init__(self, demands: Mapping[str, Demand], replicas: Mapping[str, Place], bound: int) -> None:
        self.demands, self.replicas, self.bound = demands, replicas, bound
        self.homes: Homes = {}
        self.mean = 0.0
        self.count, self.rate, self.in_flight, self.ranks = (dict.fromkeys(replicas, 0.0) for _ in range(4))
        self.ranks_differ = len({demand.rank for demand in demands.values()}) > 1
        self.total_rate = sum(demand.rate for demand in demands.values())

    def able(self, name: str) -> list[str]:
        return [replica for replica, place in self.replicas.items() if name not in place.refused]

    def wanted(self, name: str, had: int) -> int:
        """How many homes an adapter gets."""
        full, in_flight = self.bound * _FILLED, self.demands[name].in_flight
        n = max(1, math.ceil(in_flight / full))
        if n < had:
            n = min(had, max(n, math.ceil(in_flight / (full / 2))))
        return min(n, len(self.able(name)))

    def put(self, name: str, homes: tuple[str, ...]) -> None:
        """Set the homes of one adapter; its requests are shared evenly among them."""
        demand = self.demands[name]
        for sign, replicas in ((-1, self.homes.get(name, ())), (1, homes)):
            for replica in replicas:
                self.count[replica] += sign
                self.ranks[replica] += sign * demand.rank
                self.rate[replica] += sign * demand.rate / len(replicas)
                self.in_flight[replica] += sign * demand.in_flight / len(replicas)
        self.homes[name] = homes

    def best(self, name: str, share: int) -> str:
        """The replica that becomes a home of an adapter. share: adapters per replica if all have equally many."""
        demand, fair = self.demands[name], self.total_rate / len(self.replicas) * _SLACK

        def cost(replica: str) -> tuple[bool, bool, float, float, float, str]:
            n, rate = self.count[replica], self.rate[replica]
            # An empty replica is better than one of another rank, and worse than one of this rank.
            rank_distance = abs(demand.rank - self.ranks[replica] / n) if n else float(self.ranks_differ)
            full = n >= share or (n > 0 and self.total_rate > 0 and rate + demand.rate > fair)
            return full, name not in (self.replicas[replica].loaded or ()), rank_distance, rate, n, replica

        return min((replica for replica in self.able(name) if replica not in self.homes[name]), key=cost)

    def even_out(self) -> None:
        """Move adapters away from replicas that are home to too many, or to too busy ones, while that helps."""
        self.mean = sum(self.count.values()) / max(1, len(self.replicas))
        for replica in sorted(self.replicas, key=lambda replica: (-self.count[replica], replica)):
            self._shed(replica, self.count, self._has_too_many)
        for replica in sorted(self.replicas, key=lambda replica: (-self.in_flight[replica], replica)):
            self._shed(replica, self.in_flight, self._is_too_busy)

    def _has_too_many(self, source: str, target: str) -> bool:
        no_place = (
            self.count[source] > self.replicas[source].places and self.count[target] < self.replicas[target].places
        )
        above, below = self.count[source] - self.mean, self.mean - self.count[target]
        uneven = above > 0 and below > 0 and max(above, below) > self.mean * (_SLACK - 1)
        return (no_place or uneven) and self.count[target] + 1 < self.count[source]

    def _is_too_busy(self, source: str, target: str) -> bool:
        return self.in_flight[source] > self.bound and self.in_flight[target] < self.bound / 2

    def _shed(self, source: str, measure: Mapping[str, float], over: Callable[[str, str], bool]) -> None:
        """Move adapters from one replica to the ones that have least, busy ones first where that evens out the load."""
        if not any(over(source, target) for target in self.replicas if target != source):
            return
        at_home = [name for name, homes in self.homes.items() if source in homes]
        at_home.sort(key=lambda name: (-self.demands[name].in_flight, -self.demands[name].rate, name))
        even = measure is self.count
        for name, must_help in [
            *((name, True) for name in at_home),
            *((name, False) for name in reversed(at_home) if even),
        ]:
            homes = self.homes[name]
            others = [replica for replica in self.able(name) if replica not in homes]
            if source not in homes or not others:
                continue
            target = min(others, key=lambda replica: (measure[replica], replica))
            if not over(source, target):
                continue
            demand = self.demands[name]
            calmer = all(
                part / len(homes) <= (of[source] - of[target]) / 2
                for part, of in ((demand.rate, self.rate), (demand.in_flight, self.in_flight))
            )
            if calmer or not must_help:
                self.put(name, tuple(target if home == source else home for home in homes))
