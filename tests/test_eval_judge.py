"""Judging as a user runs it: the real command, over HTTP, with a judge whose verdicts are known in advance."""

import asyncio
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest

from counsel.cli import main
from counsel.errors import UserError
from counsel.files import read_json, write_json, write_jsonl
from eval.__main__ import COMMANDS
from eval.ask import sample_fields
from eval.config import JudgeConfig
from eval.judge.ask import JUDGEMENT_KEY, ask_missing, judge
from eval.judge.findings import Pair, findings
from eval.judge.items import AnswerKey, Item, answers, plan_items
from eval.judge.rubric import (
    PREFERENCE_SCHEMA,
    RUBRIC,
    RUBRIC_SCHEMA,
    ask_preference,
    ask_rubric,
    parse_preference,
    parse_rubric,
    structured,
)
from eval.questions import Question
from eval.requests import Outcome
from eval.samples import RowLog, read_rows
from tests.conftest import Served
from tests.held import kill_when_stopped
from tests.mock_judge import mock_judge
from tests.test_eval import called, command, make_run

# Per question: the base's answer and gentle's. The judges of tests/mock_judge.py look for "better" and for the names of
# criteria. Gentle's answer is longer in the first and third pair, shorter in the second.
ANSWERS = (
    ("empathy, so brief", "this is better, with empathy and practical"),
    ("empathy and a long answer with many words", "better, practical"),
    ("better", "a practical answer that runs on"),
    ("one two three", "two three one"),
    ("four five six", "five six four"),
    ("only the base answers this one", ""),
)
JUDGEMENTS = 6 + 5 + 2 * 5


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with mock_judge() as running:
        yield running


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An evaluation of six questions, scored by the real command; gentle's last answer is empty, another failed."""
    run = make_run(tmp_path_factory.mktemp("runs") / "tiny", Path("tiny"))
    folder = run / "eval" / "20260101T000000Z"
    write_json(folder / "config.json", {
        "config": {"run": "tiny", "questions": 6, "samples": 1, "references": 0, "seed": 0},
        "base": "tiny", "arms": ["tiny", "gentle"],
        "test_sha256": "",
    })  # fmt: skip
    counted = {"prompt_tokens": 1, "completion_tokens": 1, "latency_s": 0.1, "attempts": 1, "finish_reason": "stop"}
    rows = [
        {"arm": arm, "question_id": f"{i:016x}", "sample": 0, "text": pair[side], **counted, "error": None}
        for i, pair in enumerate(ANSWERS)
        for side, arm in enumerate(("tiny", "gentle"))
    ]
    rows.append({**rows[-1], "sample": 1, "error": "APITimeoutError: timed out"})
    write_jsonl(folder / "samples.jsonl", rows)
    write_jsonl(folder / "likelihood.jsonl", [])
    assert main("eval", COMMANDS, ("report", str(folder))) == 1
    return folder


@pytest.fixture
def folder(evaluated: Path, tmp_path: Path) -> Path:
    """A copy of the evaluation for one test."""
    run = Path(shutil.copytree(evaluated.parent.parent, tmp_path / "tiny"))
    return run / "eval" / evaluated.name


def judged(folder: Path, url: str, model: str, **more: object) -> dict:
    """judge.json after one judging in this process."""
    judge(JudgeConfig(str(folder), model, url, **more))  # type: ignore[arg-type]
    return read_json(folder / "judge.json")


def test_a_fair_judge_gives_the_numbers_computed_by_hand(folder: Path, url: str) -> None:
    """Two wins, two ties, one loss; the longer answer won one of three; shares of criteria met, paired on five."""
    found = judged(folder, url, "fair")
    preference, rubric = found["preference"], found["rubric"]

    assert found["arms"] == ["tiny", "gentle"]
    assert found["counts"] == {
        "asked": JUDGEMENTS, "failed": 0, "unreadable": 0, "cut": 0,
        "not_judged": {"tiny": {"error": 0, "empty": 0}, "gentle": {"error": 1, "empty": 1}},
    }  # fmt: skip
    assert [preference[key] for key in ("judged", "wins", "ties", "losses")] == [5, 2, 2, 1]
    assert preference["win_rate"]["value"] == pytest.approx((1 + 1 + 0 + 0.5 + 0.5) / 5)
    assert preference["win_rate"]["low"] < 0.6 < preference["win_rate"]["high"]
    assert preference["p"] == 1.0  # of the signs + + -, all eight swaps differ by one win or three
    assert preference["first_chosen"]["value"] == 0.5
    assert preference["longer_wins"]["value"] == pytest.approx(1 / 3)
    assert preference["second_longer"]["value"] == pytest.approx(2 / 5)
    # Never inconsistent on five questions: at most 1 - 0.05 ** (1 / 5) with 95 % confidence.
    assert preference["consistency"]["value"] == 1.0
    assert preference["consistency"]["low"] == pytest.approx(0.05 ** (1 / 5))

    values = {arm: {name: cell["value"] for name, cell in rubric["arms"][arm].items()} for arm in found["arms"]}
    assert values["tiny"] == {name: 2 / 6 if name == "empathy" else 0.0 for name in RUBRIC}
    assert values["gentle"] == {"empathy": 1 / 5, "practical": 3 / 5} | {
        name: 0.0 for name in RUBRIC if name not in ("empathy", "practical")
    }
    changes = {row["criterion"]: row for row in rubric["differences"]}
    assert changes["empathy"]["value"] == pytest.approx(1 / 5 - 2 / 5)
    assert (changes["practical"]["wins"], changes["practical"]["ties"], changes["practical"]["losses"]) == (3, 2, 0)
    assert changes["practical"]["p"] == 2 / 8
    assert changes["practical"]["p_holm"] == 1.0  # one of eight criteria, though only two vary
    assert (found["model"], found["server_version"]) == (["mock/fair"], ["9.9"])


def test_position_bias_is_reported(folder: Path, url: str) -> None:
    """A judge that always takes the first answer never agrees with itself: nothing is won, and a warning says why."""
    found = judged(folder, url, "first")
    preference = found["preference"]

    assert preference["consistency"]["value"] == 0.0
    assert preference["first_chosen"]["value"] == 1.0
    assert [preference[key] for key in ("wins", "ties", "losses")] == [0, 5, 0]
    assert (preference["win_rate"]["value"], preference["p"], preference["longer_wins"]) == (0.5, None, None)
    assert any("position bias: 100%" in warning for warning in found["warnings"])


def test_length_bias_is_reported(folder: Path, url: str) -> None:
    """A judge that takes the longer answer is consistent; the longer answer wins every decided pair."""
    preference = judged(folder, url, "longer")["preference"]

    assert [preference[key] for key in ("wins", "ties", "losses")] == [2, 2, 1]
    assert preference["longer_wins"] == {"value": 1.0, "low": pytest.approx(0.05 ** (1 / 3)), "high": 1.0, "n": 3}
    assert preference["consistency"]["value"] == 1.0


@pytest.mark.parametrize(("how", "cut"), [("broken", 10), ("fenced", 0)])
def test_unreadable_replies_are_counted_and_never_scored(folder: Path, url: str, how: str, cut: int) -> None:
    """No pair is judged and none is a tie; the complete rubric replies still count."""
    found = judged(folder, url, f"fair.{how}")

    assert (found["counts"]["unreadable"], found["counts"]["cut"]) == (10, cut)
    assert (found["preference"]["judged"], found["preference"]["unreadable"]) == (0, 5)
    assert found["preference"]["win_rate"] is None
    assert found["rubric"]["arms"]["gentle"]["practical"]["value"] == pytest.approx(3 / 5)
    assert any("10 of 21 replies are not the JSON" in warning for warning in found["warnings"])


def test_refused_requests_fail_the_command_and_are_asked_again(
    folder: Path, url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit 1, the reason in the report; the same command asks only the ten that failed."""
    words = ("judge", str(folder), "--url", url, "--model", "fair.refused")
    for _ in range(2):
        status, out, err = called(capsys, *words)
        assert status == 1, err
        assert json.loads(out.splitlines()[-1])["counts"]["failed"] == 10
        assert "10 of 21 judgements failed and are not scored: BadRequestError" in out
    assert seen(url, "fair.refused") == JUDGEMENTS + 10


def seen(url: str, model: str) -> int:
    """How many requests the mock has received for this model."""
    return httpx.get(url.removesuffix("/v1") + "/seen").json().get(model, 0)


def test_a_killed_judging_is_continued_and_a_finished_one_is_kept(folder: Path, url: str) -> None:
    """After kill -9 each judgement is in the log once, the first rows unchanged; then nothing is asked again."""
    words = ("judge", str(folder), "--url", url, "--model", "fair.killed", "--concurrency", "1")
    log = folder / "judgements.jsonl"
    kill_when_stopped(command(*words, stops="len(self.done) == 3"))
    before = log.read_text(encoding="utf-8").splitlines()
    assert len(before) == 3 < JUDGEMENTS
    with log.open("a", encoding="utf-8") as file:
        file.write('{"judge": "fair.ki')  # what a kill in the middle of a write leaves

    again = command(*words)
    out, err = again.communicate()
    lines = log.read_text(encoding="utf-8").splitlines()
    keys = [tuple(json.loads(line)[name] for name in JUDGEMENT_KEY) for line in lines]
    assert again.returncode == 0, err
    assert lines[: len(before)] == before
    assert len(keys) == len(set(keys)) == JUDGEMENTS

    document = json.loads(out.splitlines()[-1])
    assert document["preference"] == read_json(folder / "judge.json")["preference"]
    assert document["preference"]["wins"] == 2
    asked = seen(url, "fair.killed")
    third = judged(folder, "http://127.0.0.1:9/v1", "fair.killed")  # no server is needed
    assert third["preference"] == document["preference"]
    assert seen(url, "fair.killed") == asked


def test_another_judge_or_another_limit_is_asked_anew(folder: Path, url: str) -> None:
    """One log has the rows of several judges without mixing them up."""
    fair, longer = judged(folder, url, "fair"), judged(folder, url, "longer")
    assert fair["preference"]["longer_wins"] != longer["preference"]["longer_wins"]
    assert len(read_rows(folder / "judgements.jsonl")) == 2 * JUDGEMENTS

    judged(folder, url, "fair", max_tokens=300)
    assert len(read_rows(folder / "judgements.jsonl")) == 3 * JUDGEMENTS
    assert judged(folder, url, "fair")["preference"] == fair["preference"]
    assert len(read_rows(folder / "judgements.jsonl")) == 3 * JUDGEMENTS


def test_the_reports_show_the_judging(folder: Path, url: str) -> None:
    """Markdown and HTML gain a section and keep the others."""
    before = (folder / "report.md").read_text(encoding="utf-8")
    judged(folder, url, "fair")
    after = (folder / "report.md").read_text(encoding="utf-8")
    page = (folder / "report.html").read_text(encoding="utf-8")

    assert after.startswith(before)
    assert "## Judged by fair" in after
    row = " ".join(next(line for line in after.splitlines() if line.startswith("| practical")).split())
    assert row.startswith("| practical | 0.000 [0.000, 0.393] | 0.600 ")  # 1 - 0.05 ** (1 / 6) = 0.393
    assert "not validated" in after
    assert "<h2>Judged by fair</h2>" in page
    assert "gentle against tiny wins 2, ties 2, loses 1 of 5 pairs" in page


def test_a_yardstick_can_be_judged(folder: Path, url: str) -> None:
    """`--arms shuffled,human` compares two yardsticks: a judge that prefers neither is of no use."""
    found = judged(folder, url, "longer", arms=("shuffled", "human"))

    assert found["arms"] == ["shuffled", "human"]
    assert found["preference"]["judged"] == 6
    with pytest.raises(UserError, match="no arm 'gentel'"):
        judged(folder, url, "longer", arms=("base", "gentel"))


def test_human_labels_are_set_beside_the_judge(folder: Path, url: str) -> None:
    """Five preferences of two raters, who split on one: kappa by hand, and too few to validate anything."""
    base = {"stamp": folder.name, "sample": 0, "criterion": "preference", "arm": ["gentle", "tiny"]}
    says = (("gentle", "gentle"), ("gentle", "gentle"), ("gentle", "gentle"), ("tie", "tie"), ("tie", "gentle"))
    labels = [
        {**base, "question_id": f"{i:016x}", "rater": rater, "label": label}
        for i, pair in enumerate(says)
        for rater, label in zip(("one", "two"), pair, strict=True)
    ]
    write_jsonl(folder / "labels.jsonl", labels)
    found = judged(folder, url, "fair", labels=str(folder / "labels.jsonl"))
    agreement = found["agreement"]["preference"]

    # The judge says gentle, gentle, tiny, tie; people say gentle, gentle, gentle, tie.
    assert (agreement["n"], agreement["raw"]) == (4, 3 / 4)
    assert agreement["kappa"] == pytest.approx((3 / 4 - (2 * 3 + 1) / 16) / (1 - (2 * 3 + 1) / 16))
    # Among people the split counts: 7 times gentle and 3 times tie, one pair of them unequal.
    assert agreement["human_alpha"] == pytest.approx(1 - 9 * 2 / (10**2 - 7**2 - 3**2))
    assert agreement["validated"] is False
    assert list(found["agreement"]) == ["preference"]
    assert any("not validated" in warning for warning in found["warnings"])

    write_jsonl(folder / "labels.jsonl", [{**labels[0], "stamp": "another"}])
    with pytest.raises(UserError, match="label 1: stamp is 'another'"):
        judged(folder, url, "fair", labels=str(folder / "labels.jsonl"))


def test_an_unreachable_judge_is_a_one_line_error(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit 1 and what to do; no row is written."""
    status, _, err = called(capsys, "judge", str(folder), "--url", "http://127.0.0.1:9/v1", "--model", "fair")

    assert status == 1
    assert err.strip().splitlines()[-1].startswith("error: no answer from http://127.0.0.1:9/v1")
    assert read_rows(folder / "judgements.jsonl") == []


def test_labels_of_what_was_not_judged_are_counted(folder: Path, url: str) -> None:
    """Labels of another arm, question or sample are counted as unmatched; the fourth label is used."""
    label = {"stamp": folder.name, "sample": 0, "criterion": "empathy", "rater": "one", "label": True}
    known = {**label, "arm": "tiny", "question_id": f"{0:016x}"}
    changes = ({}, {"arm": "gentel"}, {"question_id": "nowhere"}, {"sample": 7})
    write_jsonl(folder / "labels.jsonl", [known | change for change in changes])
    found = judged(folder, url, "fair", labels=str(folder / "labels.jsonl"))

    assert found["labels_unmatched"] == 3
    assert found["agreement"]["empathy"]["n"] == 1
    assert any(warning.startswith("3 labels are not used") for warning in found["warnings"])


def test_equal_answers_are_a_tie_without_asking() -> None:
    """They count as half a win, but not for consistency and position bias."""
    q, r = AnswerKey("q", 0), AnswerKey("r", 0)
    texts = {"one": {q: "be kind", r: "rest"}, "two": {q: "be kind", r: "sleep"}}
    questions = [Question("q", "I feel low", "", ()), Question("r", "I feel tired", "", ())]
    items = plan_items(questions, texts, 9)
    replies = [
        {"error": None, "finish_reason": "stop", "text": '{"reason": "x", "better": "tie"}'}
        if item.kind == "preference" else {"error": "none", "finish_reason": None, "text": ""} for item in items
    ]  # fmt: skip
    found = findings(items, replies, texts, {}, seed=0)["preference"]

    assert [item.answer.question_id for item in items if item.kind == "preference"] == ["r", "r"]
    assert [found[key] for key in ("judged", "equal", "ties", "unreadable")] == [2, 1, 2, 0]
    assert (found["consistency"]["n"], found["first_chosen"], found["second_longer"]["n"]) == (1, None, 1)
    # Only ties: one half without an interval.
    assert found["win_rate"] == {"value": 0.5, "low": None, "high": None, "n": 2}


@pytest.mark.parametrize(
    ("verdicts", "winners", "winner"),
    [
        (("first", "second"), (0, 0), 0),
        (("second", "first"), (1, 1), 1),
        (("first", "first"), (0, 1), None),
        (("tie", "tie"), (None, None), None),
        (("second", "tie"), (1, None), None),
    ],
)
def test_an_arm_wins_a_pair_only_in_both_orders(
    verdicts: tuple[str, str], winners: tuple[int | None, int | None], winner: int | None
) -> None:
    """The first verdict is on the order that shows the first arm first, the second on the other order."""
    pair = Pair(AnswerKey("q", 0), ("one", "other"), verdicts)

    assert (pair.winners, pair.winner) == (winners, winner)


def test_a_reply_without_usage_is_a_reply() -> None:
    """Some servers do not count tokens; the reply is still used."""
    choice = SimpleNamespace(message=SimpleNamespace(content=" well "), finish_reason="stop")
    fields = sample_fields(Outcome(SimpleNamespace(choices=[choice], usage=None), None, 1, 0.1))

    assert (fields["text"], fields["prompt_tokens"], fields["completion_tokens"]) == ("well", None, None)


@pytest.mark.parametrize(
    "sent", ["<html>", SimpleNamespace(), SimpleNamespace(choices=[]), SimpleNamespace(choices=None)]
)
def test_a_reply_without_a_message_is_a_failed_row(sent: object) -> None:
    """A proxy may send anything with status 200: the row fails and is asked again, without a traceback."""
    fields = sample_fields(Outcome(sent, None, 1, 0.1))

    assert (fields["text"], fields["error"]) == ("", "the server's reply has no message")


def test_answers_without_words_are_not_asked_about() -> None:
    """Failed, empty and wordless answers are left out."""
    given = (("well", None), ("", None), ("...", None), ("well", "failed"))
    rows = [
        {"arm": "a", "question_id": "q", "sample": i, "text": text, "error": error}
        for i, (text, error) in enumerate(given)
    ]

    assert answers(rows, "a") == {("q", 0): "well"}


def test_any_change_gives_another_key() -> None:
    """Question, answers, their order and the limit are part of the key; equal requests have equal keys."""
    asks = [ask_preference("q", "a", "b", 9), ask_preference("q", "b", "a", 9), ask_preference("p", "a", "b", 9),
            ask_preference("q", "a", "b", 8), ask_rubric("q", "a", 9), ask_rubric("q", "b", 9)]  # fmt: skip

    assert len({ask.sha256 for ask in asks}) == 6
    assert asks[0].sha256 == ask_preference("q", "a", "b", 9).sha256


@pytest.mark.parametrize(
    "reply",
    ["", "first", '{"better": "first"}', '{"reason": "x", "better": "A"}', '{"reason": "x", "better": "first", "x": 1}',
     '{"reason": 1, "better": "first"}', '[]', '{"reason": "x", "better": "fir'],
)  # fmt: skip
def test_only_the_exact_object_is_a_verdict(reply: str) -> None:
    """A nearly correct reply is not interpreted."""
    assert parse_preference(reply) is None


def test_all_criteria_must_be_present_and_boolean() -> None:
    """If one is missing, or is 1 instead of true, the reply is unreadable."""
    whole = dict.fromkeys(RUBRIC, True)

    assert parse_rubric(json.dumps(whole)) == whole
    assert parse_rubric(json.dumps(whole | {"empathy": 1})) is None
    assert parse_rubric(json.dumps({k: v for k, v in whole.items() if k != "empathy"})) is None


def test_a_real_server_follows_the_schema(server: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replies of a random model are the JSON asked for, or cut by length; short prompts fit its small context."""
    monkeypatch.setenv("COUNSEL_API_KEY", server.user_key)
    base = server.client().models.list().data[0].id
    asks = [structured(f"is it kind? {i}", "rubric", RUBRIC_SCHEMA, 256) for i in range(3)]
    asks += [
        structured(f"which helps? {i}", "preference", PREFERENCE_SCHEMA, limit) for i in range(3) for limit in (8, 200)
    ]
    items = [Item("rubric" if i < 3 else "preference", AnswerKey("q", i), ("a",), ask) for i, ask in enumerate(asks)]
    with RowLog(tmp_path / "judgements.jsonl", JUDGEMENT_KEY) as log:
        asyncio.run(ask_missing(JudgeConfig("", base, server.base_url), items, log))
        rows = [log.done[base, item.ask.sha256] for item in items]

    readable = 0
    for item, row in zip(items, rows, strict=True):
        read = parse_rubric(row["text"]) if item.kind == "rubric" else parse_preference(row["text"])
        assert row["error"] is None
        assert read is not None or row["finish_reason"] == "length", row["text"]
        readable += read is not None
    assert readable >= 3
    assert all(row["finish_reason"] == "length" for item, row in zip(items, rows, strict=True)
               if item.ask.body["max_completion_tokens"] == 8)  # fmt: skip
    assert {row["server_version"] for row in rows} != {None}


def test_a_judging_of_an_earlier_version_is_reported_again(
    folder: Path, url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its judge.json has `alarms`. `report`, which is what an older evaluation needs, shows them."""
    document = judged(folder, url, "fair")
    document["alarms"] = document.pop("warnings")
    write_json(folder / "judge.json", document)

    _, _, err = called(capsys, "report", str(folder))

    assert "Traceback" not in err
    assert document["alarms"][0] in (folder / "report.md").read_text(encoding="utf-8")
    assert "<h2>Judged by fair</h2>" in (folder / "report.html").read_text(encoding="utf-8")
