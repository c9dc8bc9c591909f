"""How processes agree on the time: clocks with another origin, and answers with a delay."""

from types import SimpleNamespace

import pytest

from loadtest.clock import Clock


def test_the_quickest_answer_is_used(monkeypatch):
    """Of answers that take 50, 20 and 300 ms the second is used; the leader's clock is 1,000 s ahead."""
    clock = SimpleNamespace(now_s=50.0, monotonic=lambda: clock.now_s)
    monkeypatch.setattr("loadtest.clock.time", clock)
    found = Clock()

    for there_s, back_s in ((0.04, 0.01), (0.01, 0.01), (0.3, 0.0)):
        asked: list[float] = []
        assert found.ask(asked.append)
        clock.now_s += there_s
        leader_s = clock.now_s + 1000
        clock.now_s += back_s
        found.answer(asked[0], leader_s)

    assert found.error_s == pytest.approx(0.01)
    assert found.here(1060.0) == pytest.approx(60.0)


def test_a_leader_is_asked_eight_times(monkeypatch):
    """Eight questions, and none after them."""
    found = Clock()

    assert [found.ask(lambda asked_s: None) for _ in range(10)] == [True] * 8 + [False] * 2
