"""Which replica is home to which adapter: even, stable, able, and told to the front only when it is ready."""

import math
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.fleet.homes import Demand, Place, place, preloads, routed

BOUND = 12
NAMES = [f"ad{number}" for number in range(12)]
REPLICAS = ["r1", "r2", "r3", "r4"]

demands_of_any_kind = st.dictionaries(
    st.sampled_from(NAMES),
    st.builds(Demand, st.sampled_from([8, 64]), st.floats(0, 50), st.floats(0, 60)),
)
replicas_of_any_kind = st.dictionaries(
    st.sampled_from(REPLICAS),
    st.builds(
        Place,
        st.integers(1, 6),
        st.none() | st.frozensets(st.sampled_from(NAMES)),
        st.frozensets(st.sampled_from(NAMES), max_size=4),
    ),
    min_size=1,
)


def alike(n: int, **changes: float) -> dict[str, Demand]:
    return {f"ad{number}": Demand(8, **changes) for number in range(n)}


def idle(*names: str, places: int = 8) -> dict[str, Place]:
    return {name: Place(places) for name in names}


def counts(homes: dict[str, tuple[str, ...]]) -> Counter[str]:
    return Counter(replica for at in homes.values() for replica in at)


@settings(max_examples=200, deadline=None)
@given(demands_of_any_kind, replicas_of_any_kind, replicas_of_any_kind)
def test_homes_are_able_distinct_and_settle(demands, replicas, earlier):
    """Whatever was before: every adapter that some replica can serve has homes, only able ones, each once."""
    before = place(demands, earlier, {}, BOUND)
    homes = place(demands, replicas, before, BOUND)

    for name in demands:
        able = {replica for replica, at in replicas.items() if name not in at.refused}
        assert set(homes.get(name, ())) <= able
        assert bool(homes.get(name)) == bool(able)
        assert len(set(homes.get(name, ()))) == len(homes.get(name, ()))
    again = homes
    for _ in range(len(demands) + 1):
        again = place(demands, replicas, again, BOUND)
    assert place(demands, replicas, again, BOUND) == again, "the same input moves nothing in the end"


@pytest.mark.parametrize("n_adapters", [1, 2, 3, 8, 9, 64])
@pytest.mark.parametrize("n_replicas", [1, 2, 3, 4])
def test_equal_adapters_are_spread_evenly(n_adapters, n_replicas):
    """At most ceil(n / N) each."""
    homes = place(alike(n_adapters), idle(*REPLICAS[:n_replicas]), {}, BOUND)

    assert max(counts(homes).values()) <= math.ceil(n_adapters / n_replicas)


def test_nothing_moves_that_need_not():
    """A lost replica moves what was there and nothing else; an adapter more or less moves nothing."""
    before = place(alike(12), idle("r1", "r2", "r3"), {}, BOUND)
    assert counts(before) == {"r1": 4, "r2": 4, "r3": 4}

    lost = place(alike(12), idle("r1", "r2"), before, BOUND)
    assert {name for name in before if lost[name] != before[name]} == {n for n, at in before.items() if at == ("r3",)}
    assert counts(lost) == {"r1": 6, "r2": 6}

    more = place(alike(13), idle("r1", "r2", "r3"), before, BOUND)
    assert {name: more[name] for name in before} == before


def test_a_new_replica_gets_its_share():
    """Of twelve on two, it gets three or four, and the others keep theirs."""
    before = place(alike(12), idle("r1", "r2"), {}, BOUND)
    joined = place(alike(12), idle("r1", "r2", "r3"), before, BOUND)

    assert counts(joined)["r3"] in (3, 4)
    assert all(joined[name] in (before[name], ("r3",)) for name in before)


def test_a_hot_adapter_gets_homes_as_it_needs_them_and_loses_them_late():
    """A home is for 9 of the 12 in flight: 10 need two, and two stay until 4.5 would do for one."""
    replicas, homes = idle("r1", "r2", "r3"), {}
    for in_flight, n_homes in ((3, 1), (9, 1), (10, 2), (20, 3), (100, 3), (14, 3), (8, 2), (5, 2), (4, 1)):
        before = homes
        homes = place({"hot": Demand(8, 1.0, in_flight)}, replicas, homes, BOUND)
        assert len(homes["hot"]) == n_homes, in_flight
        assert homes["hot"][: len(before.get("hot", ()))] == before.get("hot", ())[:n_homes]


def test_large_ranks_are_together():
    """Four of rank 64 and four of rank 8: no replica has both."""
    demands = {f"ad{number}": Demand(64 if number % 2 else 8) for number in range(8)}
    homes = place(demands, idle("r1", "r2"), {}, BOUND)

    ranks = {replica: {demands[name].rank for name, at in homes.items() if replica in at} for replica in ("r1", "r2")}
    assert sorted(map(tuple, ranks.values())) == [(8,), (64,)]


def test_what_is_loaded_somewhere_stays_there():
    """A front that starts anew finds the adapters where they are."""
    loaded = {"r1": frozenset({"ad0", "ad3"}), "r2": frozenset({"ad1", "ad2"})}
    homes = place(alike(4), {name: Place(8, at) for name, at in loaded.items()}, {}, BOUND)

    assert homes == {"ad0": ("r1",), "ad3": ("r1",), "ad1": ("r2",), "ad2": ("r2",)}


def test_a_replica_without_a_place_for_an_adapter_gives_it_to_one_with():
    """Six on r1, which has four places; r2 has two."""
    before = dict.fromkeys(alike(6), ("r1",))
    homes = place(alike(6), idle("r1", "r2", places=4), before, BOUND)

    assert counts(homes)["r1"] <= 4


def test_a_busy_replica_gives_adapters_away_while_another_has_little_to_do():
    """20 in flight on r1, none on r2: what moves leaves r1 with no more than a home may have."""
    demands = {**alike(4, rate=5.0, in_flight=5.0), "calm": Demand(8)}
    before = {**dict.fromkeys(alike(4), ("r1",)), "calm": ("r2",)}
    homes = place(demands, idle("r1", "r2"), before, BOUND)

    assert sum(5 for name in alike(4) if homes[name] == ("r1",)) <= BOUND


def test_the_front_hears_of_a_new_home_when_it_has_loaded_the_adapter():
    """Until then requests go where they went; without an earlier home that can answer, to the new one at once."""
    wanted, mapped, lists = {"gentle": ("r2",)}, {"gentle": ("r1",)}, {"r2": ("gentle",)}
    up = idle("r1", "r2")
    loaded = {**up, "r2": Place(8, frozenset({"gentle"}))}

    assert routed(wanted, mapped, up, lists) == {"gentle": ("r1",)}
    assert routed(wanted, mapped, loaded, lists) == {"gentle": ("r2",)}
    assert routed(wanted, {}, up, lists) == wanted
    assert routed(wanted, mapped, idle("r2"), lists) == wanted, "r1 is down"
    assert routed(wanted, mapped, {**up, "r1": Place(8, refused=frozenset({"gentle"}))}, lists) == wanted
    assert routed(wanted, mapped, up, {"r2": ()}) == wanted, "r2 does not load it ahead of requests"
    assert routed(wanted, mapped, {**up, "r2": Place(8, None)}, lists) == wanted, "nothing is known of r2"
    both = routed({"gentle": ("r1", "r2")}, mapped, {**up, "r1": Place(8, frozenset({"gentle"}))}, lists)
    assert both == {"gentle": ("r1",)}, "a second home counts once it is ready"


def test_a_list_of_preloads_holds_as_many_as_fit_and_changes_only_with_the_homes():
    """Two places: the two that are asked for most; a new one replaces the coldest only if it is asked for more."""
    replicas = idle("r1", places=2)
    demands = {name: Demand(8, rate) for name, rate in (("a", 3.0), ("b", 2.0), ("c", 1.0))}
    homes = dict.fromkeys(demands, ("r1",))
    lists = preloads(homes, demands, replicas, {})
    assert lists == {"r1": ("a", "b")}

    busier = {**demands, "b": Demand(8, 0.0), "c": Demand(8, 9.0)}
    assert preloads(
        homes,
        busier,
        replicas,
        {
            "r1": (
                "a",
                "b",
            )
        },
    ) == {"r1": ("a", "c")}
    assert preloads({**homes, "a": ("r2",)}, demands, replicas, lists) == {"r1": ("b", "c")}
    assert preloads(homes, demands, replicas, lists) == lists
