"""How processes agree on the time: clocks that count from elsewhere, and answers that take their time."""

from types import SimpleNamespace

import pytest

from loadtest.clock import Clock


def test_the_quickest_answer_is_believed(monkeypatch):
    """A leader 1,000 s ahead; answers take 40 and 10 ms on the way, 10 and 10 ms back: the second has no error."""
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


def test_a_leader_is_asked_so_often_and_no_more(monkeypatch):
    """Eight questions, and none after them."""
    found = Clock()

    assert [found.ask(lambda asked_s: None) for _ in range(10)] == [True] * 8 + [False] * 2
