"""When a canary is promoted, rolled back or left to go on: intervals by hand and by papers, error rates over seeds."""

import dataclasses
import json
import math
import random
import statistics
import sys
from collections import Counter

import pytest
from scipy import stats

from counsel import rollout
from counsel import store as adapter_store
from counsel.canary import CANARY
from counsel.cli import CANNOT_BE_JUDGED, MISSED
from counsel.errors import UserError
from counsel.files import write_json
from serve.__main__ import main
from serve.canary import decision
from serve.canary.decision import PROMOTE, ROLL_BACK, WAIT
from serve.canary.evidence import CURRENT, NEW, SideUnit, Votes, count_votes, log_rows, sides_in
from serve.canary.watch import CanaryRules, Evidence, looks_at
from tests.fake_engine import put_in_store
from tests.tiny import tiny_manifest

OLD_VERSION, NEW_VERSION = (tiny_manifest("a", digit * 12) for digit in "12")


def _units(n, failed=0, ttft_s=()):
    units = [SideUnit(str(number), number < failed) for number in range(n)]
    for unit, value in zip(units, ttft_s, strict=False):
        unit.logs["ttft_s"].append(math.log(value))
    return {str(number): unit for number, unit in enumerate(units)}


@pytest.mark.parametrize(
    ("new", "current", "low", "high"),
    [((56, 70), (48, 80), 0.0524, 0.3339), ((9, 10), (3, 10), 0.1705, 0.8090), ((5, 56), (0, 29), -0.0381, 0.1926)],
)
def test_a_difference_of_shares_has_newcombes_interval(new, current, low, high):
    """The published 95 % intervals of Newcombe's method 10 (1998, table II)."""
    found = {NEW: _units(new[1], new[0]), CURRENT: _units(current[1], current[0])}
    # One look at one measure: each bound has the level 2.5 %.
    harm = decision.judge_look(1, found, Votes(), {"failed": 1.0}, alpha=0.025, looks=1).harms["failed"]
    assert (harm.low, harm.high) == (pytest.approx(low, abs=5e-5), pytest.approx(high, abs=5e-5))


def test_a_latency_is_compared_by_its_logarithms():
    """Three units a side, by hand: means of the logarithms, Welch's t with its degrees of freedom."""
    new, current = [1.0, 2.0, 4.0], [1.0, 1.5, 1.0]
    found = {NEW: _units(3, ttft_s=new), CURRENT: _units(3, ttft_s=current)}
    harm = decision.judge_look(1, found, Votes(), {"ttft_s": 1.0}, alpha=0.05, looks=2).harms["ttft_s"]
    logs = [[math.log(value) for value in side] for side in (new, current)]
    value = statistics.mean(logs[0]) - statistics.mean(logs[1])
    errors = [statistics.variance(side) / 3 for side in logs]
    freedom = sum(errors) ** 2 / sum(error**2 / 2 for error in errors)
    width = stats.t.ppf(1 - 0.025, freedom) * math.sqrt(sum(errors))
    expected = [math.exp(log) - 1 for log in (value, value - width, value + width)]
    assert list(harm) == [pytest.approx(number) for number in expected]


def test_votes_between_the_two_have_the_exact_interval():
    harm = decision.judge_look(1, {}, Votes(won=2, lost=8), {"votes_lost": 0.1}, alpha=0.025, looks=1).harms[
        "votes_lost"
    ]
    exact = stats.beta.ppf([0.025, 0.975], [8, 9], [3, 2])
    assert list(harm) == [pytest.approx(0.3), pytest.approx(exact[0] - 0.5), pytest.approx(exact[1] - 0.5)]


@pytest.mark.parametrize("name", ["failed", "ttft_s", "time_per_token_s", "votes_lost", "bad_votes"])
@pytest.mark.parametrize("n", [0, 1])
def test_a_measure_without_observations_decides_nothing(name, n):
    found = {NEW: _units(n, ttft_s=[1.0]), CURRENT: _units(n, ttft_s=[1.0])}
    assert decision.judge_look(n, found, Votes(), {name: 0.2}, 0.05, 5).decision == WAIT


def test_a_harm_within_its_margin_is_allowed_although_it_is_sure():
    found = {NEW: _units(4000, 80), CURRENT: _units(4000, 0)}
    assert decision.judge_look(1, found, Votes(), {"failed": 0.05}, 0.05, 1).decision == PROMOTE
    assert decision.judge_look(1, found, Votes(), {"failed": 0.01}, 0.05, 1).decision == ROLL_BACK


def test_latencies_without_spread_decide_nothing():
    found = {NEW: _units(50, ttft_s=[2.0] * 50), CURRENT: _units(50, ttft_s=[1.0] * 50)}
    look = decision.judge_look(50, found, Votes(), {"ttft_s": 0.2}, 0.05, 1)
    assert (look.decision, look.harms["ttft_s"]) == (WAIT, (pytest.approx(1.0), None, None))


def test_votes_are_counted_by_the_exact_versions():
    """Either order, ties and other versions; verdicts on one answer."""
    rows = [
        {"models": ["a@1", "a@2"], "choice": "first"},
        {"models": ["a@2", "a@1"], "choice": "first"},
        {"models": ["a@2", "a@1"], "choice": "second"},
        {"models": ["a@2", "a@1"], "choice": "tie"},
        {"models": ["a@2", "base"], "choice": "first"},
        {"models": ["a@2"], "choice": "bad"},
        {"models": ["a@1"], "choice": "good"},
        {"models": ["a@3"], "choice": "good"},
    ]
    bad = Counter({("new", True): 1, ("current", False): 1})
    assert count_votes(rows, "a@1", "a@2") == Votes(won=1, lost=2, bad=bad)


@pytest.fixture
def store(tmp_path):
    store = tmp_path / "store"
    for manifest in (NEW_VERSION, OLD_VERSION):
        put_in_store(store, manifest)
    return store


def _start(store):
    """A canary of half of the conversations, whose sides are the same in every run of the test."""
    started = rollout.start_canary(store, NEW_VERSION.id, 0.5).canary
    fixed = dataclasses.replace(started, salt="salt", started_utc="2025-12-31T00:00:00+00:00")
    write_json(store / "a" / CANARY, dataclasses.asdict(fixed))
    return rollout.canary_sides(store, "a")


def _row(sides, number, *, status=200, ttft_s=0.2, per_token_s=0.02, name="a", version=None):
    """One logged request of conversation `number`."""
    unit = sides.canary.unit("", str(number))
    manifest = sides.new if sides.canary.chooses(unit) else sides.current
    return {
        "time_utc": f"2026-01-01T{number // 3600:02d}:{number // 60 % 60:02d}:{number % 60:02d}.000+00:00",
        "adapter": version if version is not None else manifest.id if status < 500 else "",
        "canary": sides.canary.id, "unit": unit, "status": status, "ttft_s": ttft_s,
        "duration_s": ttft_s + 9 * per_token_s * (1 + number % 5 / 100), "completion_tokens": 10,
    }  # fmt: skip


def test_a_conversation_counts_once_and_on_its_side(store):
    """Failures without a version count by the side that was drawn; refusals (404, 429) do not; nor do exact names."""
    sides = _start(store)
    rows = [_row(sides, n) for n in (1, 1, 2)] + [_row(sides, 2, status=500), _row(sides, 3, status=429, version="")]
    found = sides_in(rows, sides.canary, "a")
    units = {sides.canary.unit("", str(n)): n for n in (1, 2, 3)}
    seen = {
        units[key]: (side, one.failed, len(one.logs["ttft_s"])) for side in found for key, one in found[side].items()
    }
    side_of = {n: NEW if sides.canary.chooses(unit) else CURRENT for unit, n in units.items()}
    assert seen == {1: (side_of[1], False, 2), 2: (side_of[2], True, 1)}
    tokens = [one.mean_log("time_per_token_s") for side in found.values() for one in side.values()]
    assert tokens == [pytest.approx(math.log(0.02), abs=0.05)] * 2


def _run(sides, rules, seed, *, slower=1.0, failing=0.0, n=2000):
    """What the looks decide on a simulated canary whose new version is slower, or fails more often."""
    draw = random.Random(seed)
    rows = []
    for number in range(n):
        is_new = sides.canary.chooses(sides.canary.unit("", str(number)))
        latency = draw.lognormvariate(math.log(0.2), 0.5) * (slower if is_new else 1.0)
        failed = draw.random() < 0.002 + (failing if is_new else 0.0)
        rows.append(_row(sides, number, status=500 if failed else 200, ttft_s=latency, per_token_s=latency / 10))
    looks = looks_at(Evidence(rows, ()), sides, rules)
    return looks[-1].decision


@pytest.mark.parametrize(
    ("planted", "decision_"),
    [({}, PROMOTE), ({"slower": 1.5}, ROLL_BACK), ({"failing": 0.15}, ROLL_BACK)],
    ids=["equal", "slower", "failing"],
)
def test_an_equal_version_is_promoted_and_a_worse_one_rolled_back(store, planted, decision_):
    """20 seeds each; docs/canary.md has the rates over many."""
    sides = _start(store)
    rules = CanaryRules("a", units=600)
    decided = Counter(_run(sides, rules, seed, **planted) for seed in range(20))
    assert decided == {decision_: 20}


def test_a_look_is_the_same_whenever_it_is_taken(store):
    """What comes after the last conversation that a look needs does not change it."""
    sides = _start(store)
    rules = CanaryRules("a", units=50, looks=5, failed=0.001, ttft=0, time_per_token=0)
    rows = [_row(sides, number) for number in range(400)]
    worse = [_row(sides, number, status=500) for number in range(400, 800)]
    looks = looks_at(Evidence(rows, ()), sides, rules)
    assert len(looks) == 5
    assert looks == looks_at(Evidence(rows + worse, ()), sides, rules)
    assert looks[:2] == looks_at(Evidence(rows[:100], ()), sides, rules)[:2]


def _log(tmp_path, rows, folder="8000", file="requests.jsonl"):
    path = tmp_path / "logs" / folder / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _watch(tmp_path, store, *flags):
    common = ["--store", str(store), "--logs", str(tmp_path / "logs"), "--votes", str(tmp_path)]
    return main(["canary", "watch", "a", *common, "--json", *flags])


def test_logs_of_several_servers_are_read_in_order(tmp_path, store):
    """Rotated ones too; a torn last line and other canaries' rows are left out."""
    sides = _start(store)
    rows = [_row(sides, number) for number in range(6)]
    _log(tmp_path, rows[::2], "8000")
    _log(tmp_path, [rows[1], {**rows[0], "canary": "0" * 16}, {"time_utc": "2026"}], "8001")
    _log(tmp_path, [rows[3]], "8001", "requests.jsonl.1")
    with (tmp_path / "logs" / "8001" / "requests.jsonl").open("a") as file:
        file.write('{"time_utc": "20')
    assert log_rows(tmp_path / "logs", sides.canary) == [*rows[:5]]


def test_watch_promotes_and_says_so(tmp_path, store, capsys):
    sides = _start(store)
    _log(tmp_path, [_row(sides, number, ttft_s=0.2 + number % 7 / 100) for number in range(2000)])
    assert _watch(tmp_path, store) == 0
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert document["decision"] == "promote"
    assert (document["adapter"], document["against"]) == (NEW_VERSION.id, OLD_VERSION.id)
    assert adapter_store.find(store, "a") == NEW_VERSION
    assert not (store / "a" / CANARY).exists()


def test_watch_rolls_back_what_fails(tmp_path, store, capsys):
    sides = _start(store)
    rows = [_row(sides, number) for number in range(400)]
    _log(tmp_path, [{**row, "status": 500} if row["adapter"] == NEW_VERSION.id else row for row in rows])
    assert _watch(tmp_path, store) == MISSED
    assert "rolled back" in capsys.readouterr().out
    assert adapter_store.find(store, "a") == OLD_VERSION


def test_watch_ends_undecided_after_its_last_look(tmp_path, store, capsys):
    """No stream was measured, so the latencies' rules cannot be judged: the canary goes on."""
    sides = _start(store)
    _log(tmp_path, [{**_row(sides, number), "ttft_s": None} for number in range(2000)])
    assert _watch(tmp_path, store) == CANNOT_BE_JUDGED
    assert "ttft_s not seen" in capsys.readouterr().out
    assert adapter_store.read_versions(store, "a").canary


@pytest.mark.parametrize(("status", "expected"), [(0, 0), (3, MISSED), (1, CANNOT_BE_JUDGED), (4, CANNOT_BE_JUDGED)])
def test_a_check_has_the_last_word(tmp_path, store, capsys, status, expected):
    """Such as `counsel eval gate`: 3 rolls back, anything else than 0 leaves the canary as it is."""
    sides = _start(store)
    _log(tmp_path, [_row(sides, number) for number in range(2000)])
    check = f'{sys.executable} -c "raise SystemExit({status})"'
    flags = ["--failed", "0.05", "--ttft", "0", "--time-per-token", "0", "--checks", check]
    assert _watch(tmp_path, store, *flags) == expected
    meant = {0: NEW_VERSION, MISSED: OLD_VERSION}.get(expected, OLD_VERSION)
    assert adapter_store.find(store, "a") == meant
    assert bool(adapter_store.read_versions(store, "a").canary) == (expected == CANNOT_BE_JUDGED)


def test_peoples_votes_roll_back_a_version(tmp_path, store):
    sides = _start(store)
    _log(tmp_path, [_row(sides, number) for number in range(600)])
    times = ["2026-01-01T00:00:00+00:00"] * 40
    rows = [{"time_utc": time, "models": [OLD_VERSION.id, NEW_VERSION.id], "choice": "first"} for time in times]
    (tmp_path / "votes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert _watch(tmp_path, store, "--votes-lost", "0.1") == MISSED


def test_status_shows_both_sides(tmp_path, store, capsys):
    sides = _start(store)
    _log(tmp_path, [_row(sides, number) for number in range(100)])
    assert main(["canary", "status", "a", "--store", str(store), "--logs", str(tmp_path / "logs"), "--json"]) == 0
    *_, current, new, line = capsys.readouterr().out.splitlines()
    document = json.loads(line)
    assert document["current"]["units"] + document["new"]["units"] == 100
    assert "ms" in current
    assert "200.0 ms" in new
    assert str(document["new"]["units"]) in new


def test_rules_that_judge_nothing_are_refused(store, capsys):
    _start(store)
    flags = ["--failed", "0", "--ttft", "0", "--time-per-token", "0", "--store", str(store)]
    assert main(["canary", "watch", "a", *flags]) == 1
    assert "nothing would be judged" in capsys.readouterr().err


def test_a_canary_that_somebody_else_ended_is_left_alone(store):
    """The watch's decision is about its own canary only."""
    sides = _start(store)
    rollout.end_canary(store, "a")
    rollout.start_canary(store, NEW_VERSION.id, 0.2)
    for act in (rollout.promote_canary, rollout.end_canary):
        with pytest.raises(UserError, match="another canary runs"):
            act(store, "a", only=sides.canary.id)
    assert dataclasses.replace(adapter_store.read_versions(store, "a").canary, share=0.2)
