"""The model of a fleet against formulas: queues of one, two and three servers, loads by hand, losses by hand."""

import importlib.util
import statistics

import pytest

if importlib.util.find_spec("simpy") is None:
    pytest.skip("SimPy is not installed", allow_module_level=True)

from benchmarks.fleet_model import RETRIES, Model, Site

MANY = 10**6


def model_of(adapters: int = 0, **changes: object) -> Model:
    usual: dict[str, object] = {"replicas": 1, "places": 4, "slots": 1, "service_s": 1.0, "load_s": 0.0, "bound": MANY,
                                "queued": MANY}  # fmt: skip
    return Model(Site(**{**usual, **changes}), [f"ad{number}" for number in range(adapters)])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("servers", "rate", "random_service", "wait_s"),
    [
        (1, 0.5, True, 1.0),  # M/M/1: rho / (mu - lambda)
        (2, 1.0, True, 1 / 3),  # M/M/2: Erlang C is 1/3
        (3, 2.0, True, 4 / 9),  # M/M/3: Erlang C is 4/9
        (1, 0.5, False, 0.5),  # M/D/1: half of M/M/1's
    ],
)
def test_a_replica_is_the_queue_of_the_books(servers: int, rate: float, random_service: bool, wait_s: float) -> None:
    """The mean wait of 40,000 Poisson arrivals at a service rate of 1; seeded, so the same each time."""
    model = model_of(slots=servers, random_service=random_service)
    model.open_loop(rate, 40_000 / rate, lambda at_s: "base")

    assert statistics.fmean(one.waited_s for one in model.answered) == pytest.approx(wait_s, rel=0.04)
    assert {one.outcome for one in model.answered} == {"ok"}


def test_loads_by_hand() -> None:
    """Two adapters in turn: with one place each request loads, with two places each adapter does once."""
    for places, expected in ((1, 10), (2, 2)):
        model = model_of(2, places=places, load_s=0.25, routing="leastconn")
        model.env.run(until=10.0)
        # Those that a lone server loads at its start, the newest first in room.
        before = model.loads
        assert before == places
        model.closed_loop(["ad0", "ad1"] * 5, at_once=1)
        assert model.loads - before == (expected if places == 1 else 0)
        # A request that loads waits until its predecessor was idle for long enough, in steps, and for the load.
        waits = [round(one.waited_s, 6) for one in model.answered]
        assert waits == ([0.25] + [0.75] * 9 if places == 1 else [0.0] * 10)


def test_homes_load_each_adapter_once() -> None:
    """Eight adapters, two replicas with four places: as on the real fleet in tests/test_fleet.py."""
    model = model_of(8, replicas=2, bound=4, load_s=0.1)
    model.env.run(until=10.0)
    model.closed_loop([f"ad{number % 8}" for number in range(80)], at_once=4)

    assert model.loads == 8
    assert sorted(map(len, model.keeper.told.values())) == [1] * 8


def test_a_dead_replica_costs_the_streams_that_had_begun() -> None:
    """Two streams run, two streams and two plain requests wait for a slot: two are cut, and four answered elsewhere."""
    model = model_of(1, replicas=2, slots=2, bound=MANY, service_s=10.0)
    model.env.run(until=1.0)
    (home,) = model.keeper.told["ad0"]
    for stream in (True, True, True, True, False, False):
        model.env.process(model.request("ad0", stream))
    model.env.run(until=2.0)
    model.kill([home], back_after_s=5.0)
    model.env.run(until=100.0)

    assert sorted(one.outcome for one in model.answered) == ["cut", "cut", "ok", "ok", "ok", "ok"]


@pytest.mark.parametrize("replicas", [1, 2, 3, 8])
def test_a_full_fleet_refuses_what_no_replica_takes(replicas: int) -> None:
    """Each takes one at a time. A retry goes to another replica, so all find a place but the last one."""
    model = model_of(replicas=replicas, queued=1, routing="leastconn")
    for _ in range(replicas + 1):
        model.env.process(model.request("base"))
    model.env.run()

    assert RETRIES == 3
    assert sorted(one.outcome for one in model.answered) == ["lost"] + ["ok"] * replicas
