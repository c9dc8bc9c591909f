"""Finished runs with scripted times, judged from their files: each metric is what was scripted."""

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from counsel.cli import main
from counsel.errors import UserError
from counsel.files import read_json, write_json, write_jsonl
from loadtest.__main__ import COMMANDS
from loadtest.arrivals import due_times, rate_knots
from loadtest.records import RequestRecord, append_records
from loadtest.results import read_results
from loadtest.scenario import Scenario
from loadtest.verdict import summarize_run
from loadtest.workload import Arrival
from tests.sse_server import standin
from tests.test_loadtest_metrics import failure, reply

Reply = Callable[[int, float], RequestRecord]


def every(e2e_s: float, ttft_s: float = 0.1, tokens: int = 11) -> Reply:
    """Each reply is complete after `e2e_s`."""
    return lambda n, due_s: reply(n, due_s, ttft_s=ttft_s, tokens=tokens, tpot_s=(e2e_s - ttft_s) / (tokens - 1))


def mostly(usual: Reply, other: Reply, which: Callable[[int], bool]) -> Reply:
    return lambda n, due_s: (other if which(n) else usual)(n, due_s)


def queued(slots: int, service_s: float) -> Reply:
    """A server with this many slots, first come first served."""
    free = [0.0] * slots

    def answer(n: int, due_s: float) -> RequestRecord:
        begin_s = max(due_s, min(free))
        free[free.index(min(free))] = begin_s + service_s
        return reply(n, due_s, ttft_s=begin_s - due_s + service_s / 2, tokens=11, tpot_s=service_s / 20)

    return answer


def judged(
    folder: Path,
    records: Sequence[RequestRecord],
    models: Sequence[str] = ("base",),
    seconds: float | None = None,
    planned: int | None = None,
    **options: Any,
) -> dict[str, Any]:
    """The summary of a run with these records and a client within every bound."""
    scenario = Scenario(**{"arrivals": "constant", **options})
    folder.mkdir(exist_ok=True)
    write_json(folder / "config.json", scenario.to_json())
    write_json(folder / "target.json", {"models": list(models), "asked": list(models), "base": models[0]})
    arrivals = [
        Arrival(record.id, record.due_s, record.model, (0,), 11, 0.0, None, tuple(record.tags))
        for record in records
        if not record.turn
    ]
    missing = (planned or len(arrivals)) - len(arrivals)
    arrivals += [arrivals[-1]._replace(id=len(arrivals) + n) for n in range(missing)]
    write_jsonl(folder / "plan.jsonl", (arrival.to_json() for arrival in arrivals))
    last_s = max(record.end_s for record in records) if seconds is None else seconds
    calm = {"worker": 0, "due": 0, "in_flight": 0, "hub_lag_s": 0.0, "cpu": 0.1}
    write_jsonl(folder / "client.jsonl", ({**calm, "t_s": float(t)} for t in range(1, int(last_s) + 2)))
    write_jsonl(folder / "server.jsonl", ())
    (folder / "requests.jsonl").unlink(missing_ok=True)
    append_records(folder / "requests.jsonl", sorted(records, key=lambda record: record.end_s))
    summary = summarize_run(read_results(folder))
    write_json(folder / "summary.json", summary)
    return summary


def recorded(answer: Reply, rate: str, duration_s: float, process: str = "constant") -> list[RequestRecord]:
    """The records of a plan whose replies are what `answer` returns."""
    return [answer(n, due_s) for n, due_s in enumerate(due_times(process, rate_knots(rate, duration_s), 1.0, 0))]


# answer, rate, duration, warm-up: the replies per second of the server, worked out by hand.
RATES = {
    "slow without a queue": (every(5.0), "5", 10, 0, 5.0),
    "slow, with a warm-up": (every(5.0), "5", 20, 5, 5.0),
    "one straggler of 20 s": (mostly(every(0.15), every(20.0), lambda n: n == 10), "10", 6, 0, 10 * 59 / 60),
    "one that is nearly empty": (mostly(every(5.0), every(0.2), lambda n: n == 10), "5", 30, 0, 5.0),
    "every second one slow": (mostly(every(0.1), every(2.5, ttft_s=2.4), lambda n: n % 2), "10", 10, 0, 10.0),
    "every second one slow, with a warm-up": (
        mostly(every(0.1), every(2.5, ttft_s=2.4), lambda n: n % 2), "10", 20, 5, 10.0),
    "asked for a fifth more than it can": (queued(10, 0.5), "24", 20, 0, 20.0),
    "asked for five times as much": (queued(10, 0.5), "100", 10, 0, 20.0),
    "a ramp": (every(0.3), "ramp(2, 18)", 50, 0, 10.0),
    "a spike": (every(0.3), "spike(1, 20, 20, 40)", 60, 0, (40 * 1 + 20 * 20) / 60),
    "as beside GuideLLM": (every(0.5, ttft_s=0.2), "10", 10, 0, 10.0),
}  # fmt: skip


@pytest.mark.parametrize("case", RATES)
def test_rates_are_those_of_the_server(tmp_path, case):
    """Neither the filling at the start nor the drain at the end counts; tokens are 11 times the requests."""
    answer, rate, duration_s, warmup_s, true = RATES[case]
    records = recorded(answer, rate, duration_s)
    found = judged(tmp_path, records, rate=rate, duration_s=duration_s, warmup_s=warmup_s)["all"]

    assert found["requests_per_s"] == pytest.approx(true, rel=0.01)
    assert found["tokens_per_s"] == pytest.approx(11 * true, rel=0.01)
    assert found["goodput_per_s"] == pytest.approx(true, rel=0.01)


def test_slow_replies_without_a_queue_have_the_offered_rate(tmp_path):
    """Five requests per second come back at five per second, though each takes 5 s."""
    slo = ("requests_per_s >= 4.9", "tokens_per_s >= 54")
    summary = judged(tmp_path, recorded(every(5.0), "5", 10), rate="5", duration_s=10, slo=slo)

    assert summary["verdict"] == "passed"


def test_random_arrivals_come_back_at_their_own_rate(tmp_path):
    """Poisson arrivals and replies of random length: the rate is that of the plan, apart from the edges."""
    noise = random.Random(1)
    records = recorded(lambda n, due_s: every(noise.uniform(0.3, 1.2))(n, due_s), "20", 120, "poisson")
    found = judged(tmp_path, records, rate="20", duration_s=120)["all"]

    assert found["requests_per_s"] == pytest.approx(len(records) / 120, rel=0.01)


def test_a_conversation_counts_every_turn(tmp_path):
    """Two conversations per second of three turns, 1 s each with 2 s between: 6 replies per second."""
    records = [
        reply(n, due_s + 3 * turn, ttft_s=0.5, tokens=11, tpot_s=0.05)
        for n, due_s in enumerate(due_times("constant", rate_knots("2", 40), 1.0, 0))
        for turn in range(3)
    ]
    for number, record in enumerate(records):
        record.turn = number % 3
    found = judged(tmp_path, records, rate="2", duration_s=40)["all"]

    assert found["requests_per_s"] == pytest.approx(6.0, rel=0.01)


def test_a_limited_number_of_requests_ends_the_window(tmp_path):
    """The schedule is a minute, but its first twenty requests are due, and come back, in 5 s."""
    records = recorded(every(0.3), "4", 60)[:20]
    found = judged(tmp_path, records, rate="4", duration_s=60, requests=20)["all"]

    assert found["requests_per_s"] == pytest.approx(4.0, rel=0.01)


def test_a_run_that_was_stopped_has_the_rates_until_then(tmp_path):
    """Stopped after 30 of 600 s: the run is invalid, and its rate is 4 requests/s, not a twentieth of that."""
    records = [record for record in recorded(every(0.3), "4", 600) if record.due_s < 30]
    found = judged(tmp_path, records, rate="4", duration_s=600, seconds=29, planned=2400)

    assert found["verdict"] == "invalid"
    assert found["all"]["requests_per_s"] == pytest.approx(4.0, rel=0.02)


def test_requests_cut_off_by_the_drain_do_not_lower_the_rate(tmp_path):
    """Replies take 5 s and the drain 1 s: those of the last 4 s never end, and the rate is still 5."""
    records = recorded(every(5.0), "5", 20)
    for record in records:
        if record.end_s > 21:
            record.outcome, record.last_s, record.end_s, record.finish = "unfinished", None, 21.0, None
    found = judged(tmp_path, records, rate="5", duration_s=20)["all"]

    assert found["requests_per_s"] == pytest.approx(5.0, rel=0.03)


@pytest.mark.parametrize("straggler", [False, True])
def test_a_closed_loop_has_the_rate_of_its_clients(tmp_path, straggler):
    """Four clients that each wait 0.5 s ask 8 times per second; one reply of 20 s at the end does not change it."""
    records = [
        reply(4 * n + client, n / 2, ttft_s=0.1, tokens=11, tpot_s=0.04) for n in range(40) for client in range(4)
    ]
    if straggler:
        records[-1] = every(20.0)(records[-1].id, records[-1].due_s)
    found = judged(tmp_path, records, arrivals="closed", concurrency=4, duration_s=20)["all"]

    assert found["requests_per_s"] == pytest.approx(8.0, rel=0.01)


def hanging_up(record: RequestRecord, after_s: float) -> RequestRecord:
    """The same request by a client that hangs up, unless the reply is quicker."""
    record.tags = ("hangs_up",)
    if record.end_s - record.sent_s > after_s:
        record.outcome, record.last_s, record.finish, record.end_s = "cancelled", None, None, record.sent_s + after_s
        record.first_s = record.first_s if record.first_s < record.end_s else None
    return record


def test_clients_that_hang_up_do_not_hide_slow_replies(tmp_path):
    """Fifteen of a hundred replies take 3 s, and half of the clients wait 1 s: the p90 of 1 s is missed.

    Of the clients that stay one in five is slow; of those that hang up every complete reply is quick.
    """
    answer = mostly(every(0.2), every(3.0, ttft_s=2.9), lambda n: n % 20 in (0, 6, 13))
    records = recorded(answer, "10", 40)
    records = [hanging_up(record, 1.0) if n % 2 else record for n, record in enumerate(records)]
    slo = ("ttft_p90_s <= 1", "e2e_p90_s <= 1")
    summary = judged(tmp_path, records, rate="10", duration_s=40, slo=slo)

    assert summary["verdict"] == "missed"
    assert summary["all"]["ttft_s"]["n"] == summary["all"]["stayed"] == 200
    assert [item["held"] for item in summary["slo"]] == [False, False]


@pytest.mark.parametrize("slo", [(), ("error_rate <= 0.01",), ("ttft_p90_s <= 100",), ("requests_per_s >= 0",)])
def test_a_server_without_any_reply_does_not_pass(tmp_path, slo):
    """Every client hangs up before its reply: the verdict is missed or invalid."""
    records = [hanging_up(record, 1.0) for record in recorded(every(900.0, ttft_s=899), "5", 20)]
    summary = judged(tmp_path, records, rate="5", duration_s=20, slo=slo)

    assert summary["all"]["ok"] == 0
    assert summary["verdict"] in ("missed", "invalid")


def test_the_error_rate_is_over_the_clients_that_stay(tmp_path):
    """Half of the clients hang up before anything can fail. Of the other hundred, ten fail: one in ten."""
    records = recorded(every(0.5), "10", 20)
    for n, record in enumerate(records):
        if n % 2:
            hanging_up(record, 0.05)
        elif n % 20 == 0:
            records[n] = failure(n, record.due_s)
    found = judged(tmp_path, records, rate="10", duration_s=20)["all"]

    assert (found["n"], found["stayed"], found["errors"]) == (200, 100, 10)
    assert found["error_rate"] == pytest.approx(0.1)


def test_a_model_without_requests_is_judged_too(tmp_path):
    """Three models were planned and one got no request: its objective is missed, and the run does not pass."""
    records = recorded(every(0.5), "5", 20)
    for n, record in enumerate(records):
        record.model = ("base", "gentle")[n % 2]
    summary = judged(
        tmp_path, records, ("base", "gentle", "calm"), rate="5", duration_s=20, slo=("*: ttft_p50_s <= 9",)
    )

    assert {item["scope"]: (item["n"], item["held"]) for item in summary["slo"]} == {
        "base": (50, True), "calm": (0, False), "gentle": (50, True)
    }  # fmt: skip
    assert summary["verdict"] == "invalid"
    assert summary["models"]["calm"]["n"] == 0
    assert json.dumps(summary)


def test_gaps_of_failed_requests_are_slower_than_any_bound(tmp_path):
    """A fifth of the requests fail: the p90 of the gaps is beyond any bound, the median is not."""
    records = [
        failure(record.id, record.due_s) if record.id % 5 == 0 else record for record in recorded(every(0.5), "10", 20)
    ]
    slo = ("itl_p50_s <= 0.05", "itl_p90_s <= 99")
    summary = judged(tmp_path, records, rate="10", duration_s=20, slo=slo)

    assert [(item["held"], item["n"]) for item in summary["slo"]] == [(True, 200), (False, 200)]


def test_a_run_that_was_killed_is_judged_by_its_records(tmp_path, capsys):
    """No summary, no server samples, last lines cut off: `report` makes table and page, and it does not pass."""
    records = recorded(every(0.3), "4", 40)[:100]
    judged(tmp_path, records, rate="4", duration_s=40, seconds=24, planned=160, slo=("error_rate <= 1",))
    for name in ("summary.json", "server.jsonl"):
        (tmp_path / name).unlink()
    # What a kill leaves: each file ends in half a line, here within a character.
    (tmp_path / "churn.jsonl").write_text("")
    for name in ("requests.jsonl", "client.jsonl", "churn.jsonl"):
        with (tmp_path / name).open("ab") as file:
            file.write('{"worker": 0, "error": "\u00fc'.encode()[:-1])
    status = main("loadtest", COMMANDS, ["report", str(tmp_path)])

    summary = json.loads(capsys.readouterr().out.strip().split("\n")[-1])
    assert (status, summary["verdict"]) == (4, "invalid")
    assert "it did not come to its end" in summary["invalid"]
    assert summary["all"]["requests_per_s"] == pytest.approx(4.0, rel=0.02)
    assert (tmp_path / "report.html").is_file()
    # Judging it again gives the same.
    assert main("loadtest", COMMANDS, ["report", str(tmp_path)]) == 4


def test_a_results_folder_that_cannot_be_made_is_one_line(tmp_path, capsys):
    """Its parent is a file, which fails like a full or read-only disk."""
    (tmp_path / "q.jsonl").write_text('{"question": "How are you?"}\n')
    with standin("base") as url:
        words = ["--prompts", str(tmp_path / "q.jsonl"), "--out", str(tmp_path / "q.jsonl/out"), "--url", url]
        status = main("loadtest", COMMANDS, words)

    assert status == 1
    assert capsys.readouterr().err.startswith("error: cannot write")


OLDER = {"good": "goodput_slo", "bare": "no_system_prompt", "unique": "unique_prompts"}


@pytest.mark.parametrize("command", [["report", "a"], ["compare", "a", "b"], ["compare", "b", "a"]])
def test_results_of_an_older_version_say_which_keys_to_rename(tmp_path, monkeypatch, capsys, command):
    """One line names the file, its old keys and their new names; with those, the results can be read."""
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        judged(tmp_path / name, recorded(every(0.3), "4", 40), rate="4", duration_s=40)
    config = read_json(tmp_path / "a/config.json")
    old_keys = {new: old for old, new in OLDER.items()}
    write_json(tmp_path / "a/config.json", {old_keys.get(key, key): value for key, value in config.items()})

    assert main("loadtest", COMMANDS, command) == 1
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert "'a/config.json'" in message
    assert all(f"{old} is now {new}" in message for old, new in OLDER.items())
    write_json(tmp_path / "a/config.json", config)
    assert main("loadtest", COMMANDS, command) == 0


def test_results_with_an_unknown_key_are_from_another_version(tmp_path):
    """There is no new name to give, only what to do."""
    judged(tmp_path, recorded(every(0.3), "4", 40), rate="4", duration_s=40)
    write_json(tmp_path / "config.json", {**read_json(tmp_path / "config.json"), "from_the_future": 1})

    with pytest.raises(UserError, match="from_the_future; use the version it is from, or run the load test again"):
        read_results(tmp_path)
