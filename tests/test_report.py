"""The pages: what others wrote is text, a page needs no other file, and its charts are accessible."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from markupsafe import Markup

import demo
from counsel.chat import NOTICE
from counsel.files import write_json, write_jsonl
from counsel.report import answer_columns, numeric, page, section
from counsel.report import charts as report_charts
from counsel.report.charts import RED, SERIES, chart
from counsel.run import Run
from eval.ask import Question
from eval.metrics import METRICS, PRIMARY
from eval.page import evaluation_page
from eval.report import evaluation_finding
from loadtest.charts import curves, latencies, timeline
from loadtest.report import load_test_finding as load_finding
from tests.test_loadtest_metrics import anything, failure, reply, summarize

HOSTILE = '<script>alert("$x_1$")</script>'
STYLE = (Path(report_charts.__file__).parent / "style.css").read_text(encoding="utf-8")


class Page(HTMLParser):
    """The tags, ids and texts of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    @property
    def names(self) -> list[str]:
        return [tag for tag, _ in self.tags]

    @property
    def ids(self) -> list[str]:
        return [str(attributes["id"]) for _, attributes in self.tags if "id" in attributes]


@pytest.fixture(scope="module")
def hostile() -> Page:
    """A page on which every value that is not the project's own is a script."""
    rows = [reply(0, 0, HOSTILE), reply(1, 1), failure(2, 2, HOSTILE)]
    sections = [
        section(HOSTILE, [(HOSTILE, HOSTILE), (HOSTILE, HOSTILE)], note=HOSTILE),
        section("charts", latencies(summarize(rows, 0, anything)["models"])),
        section("timeline", timeline(rows, [{"t_s": 1, "running": 1, "waiting": 0, "kv_used": 0.5}], 1)),
        answer_columns("Answers", [(HOSTILE, [(HOSTILE, HOSTILE)])]),
    ]
    return Page(page(HOSTILE, sections, finding=HOSTILE, warnings=[HOSTILE]))


def test_what_others_wrote_is_text(hostile: Page) -> None:
    """A question, an answer, a model's name and a path hold a script: none of them becomes one."""
    assert "script" not in hostile.names
    assert sum(text.strip() == HOSTILE for text in hostile.texts) >= 12


def change(metric: str, value: float, p_holm: float | None, arm: str = "kind") -> dict[str, Any]:
    """A difference from the base with an interval of 0.1 to either side."""
    return {"arm": arm, "against": "base", "metric": metric, "value": value, "low": value - 0.1, "high": value + 0.1,
            "n": 6, "p": 0.01, "d_z": 1.0 if value > 0 else -1.0, "mde": 0.2, "p_holm": p_holm}  # fmt: skip


def evaluation(arm: str = "kind", differences: Sequence[Mapping[str, Any]] = ()) -> dict[str, Any]:
    """The summary of an evaluation of the base and one adapter."""
    cell = {"value": 0.5, "low": 0.4, "high": 0.6, "n": 6}
    counted = dict.fromkeys(("rows", "errors", "empty", "cut", "retries", "tokens"), 6) | {"diversity": None}
    arms = {
        name: {"kind": kind, "metrics": dict.fromkeys(METRICS, cell), **counted}
        for name, kind in (("base", "base"), (arm, "adapter"), ("human", "yardstick"))
    }
    return {
        "run": arm, "stamp": "20260101T000000Z", "questions": 6, "samples_per_question": 1, "references": 12,
        "arms": arms, "differences": differences, "topics": {arm: {"base": {"similarity_max": cell}}},
        "seen": {}, "warnings": [arm], "spec": {"config": {"url": "http://127.0.0.1:1/v1", "run": arm}},
    }  # fmt: skip


def test_an_evaluation_with_scripts_in_it_has_only_its_own() -> None:
    """Question, answer, topic, adapter and path hold a script: the page has the two that it needs, and all answers."""
    differences = [change(metric, 0.3, None, HOSTILE) for metric in METRICS]
    rows = [{"arm": HOSTILE, "question_id": "q", "sample": 0, "text": HOSTILE, "scores": {}, "error": None}]
    question = Question("q", HOSTILE, HOSTILE, (HOSTILE,))
    text = evaluation_page(evaluation(HOSTILE, differences), [question], rows, None)
    parsed = Page(text)
    data = json.loads(text.split('id="data">')[1].split("</script>")[0])

    assert parsed.names.count("script") == 2
    assert data["scores"] == rows
    assert data["questions"][0]["answers"] == [HOSTILE]
    assert parsed.names.count("svg") == 2
    assert len(parsed.ids) == len(set(parsed.ids))
    assert NOTICE in text


def test_the_demo_escapes_questions_and_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its page is made from the files of a run; the scripts that a question and two answers hold stay text."""
    run = Run(tmp_path)
    monkeypatch.setattr(demo, "RUN", run)
    write_json(tmp_path / "train.json", {"steps": 2, "wall_s": 1.0, "tokens_per_s": 9.0, "val_loss_base": 3.0,
                                         "val_loss": 2.0})  # fmt: skip
    write_jsonl(tmp_path / "metrics.jsonl", [{"step": 0, "val_loss": 3.0}, {"step": 1, "loss": 2.5},
                                             {"step": 2, "loss": 2.4, "val_loss": 2.0}])  # fmt: skip
    write_jsonl(tmp_path / "data" / "test.jsonl", [{"question_id": "q", "question": HOSTILE}])
    rows = [
        {"arm": arm, "question_id": "q", "text": HOSTILE, "finish_reason": "stop"} for arm in (demo.BASE, demo.NAME)
    ]
    write_jsonl(tmp_path / "samples.jsonl", rows)
    summary = evaluation(demo.NAME) | {"folder": str(tmp_path)}
    summary["arms"][demo.BASE] = summary["arms"].pop("base")
    load = {"models": summarize([reply(0, 0, demo.NAME), failure(1, 1, demo.NAME)], 0, anything)["models"],
            "invalid": []}  # fmt: skip
    parsed = Page(demo.report_page(summary, load))

    assert "script" not in parsed.names
    assert sum(text.strip() == HOSTILE for text in parsed.texts) == 3
    assert parsed.names.count("svg") == 1
    assert demo.speed(load)[1:3] == [("requests answered", "-", "1"), ("requests failed", "-", "1")]


def test_the_finding_is_one_sentence_of_the_primary_metrics() -> None:
    """Lower bits per byte and higher similarity are better, if significant; a secondary metric is not counted."""
    primary = dict(zip(PRIMARY, ((-0.3, 0.01), (0.3, 0.01), (-0.3, 0.04), (0.3, 0.06)), strict=True))
    differences = [change(metric, *value) for metric, value in primary.items()] + [change("rouge_2", 0.3, None)]

    assert evaluation_finding(evaluation(differences=differences)) == (
        "Of 4 primary metrics, kind is better on 2 (bits per byte; similarity, best reference), worse on 1 (ROUGE-1) "
        "and not significantly different on 1 (chrF), compared with base."
    )
    assert evaluation_finding(evaluation(differences=[])) == "No primary metric of kind was measured."


@pytest.mark.parametrize(
    ("verdict", "slo", "sentence"),
    [
        ("passed", [True], "The server met its objective: 2 requests, 0 failed; the first token took 500 ms (median)"),
        ("missed", [True, False], "The server missed 1 of 2 objectives (ttft_p90_s <= 1): 2 requests, 0 failed"),
        ("unjudged", [], "No objectives were set: 2 requests"),
        (
            "invalid",
            [True],
            "This run measured its client as well as the server, so do not use its numbers: 2 requests",
        ),
    ],
)
def test_the_finding_of_a_load_test_is_its_verdict(verdict: str, slo: list[bool], sentence: str) -> None:
    """Objectives first, then how many requests and how fast; an invalid run is never said to have met anything."""
    objectives = [{"metric": "ttft_p90_s", "sign": "<=", "bound": 1.0, "held": held} for held in slo]
    summary = {**summarize([reply(0, 0), reply(1, 1)], 0, anything), "slo": objectives, "verdict": verdict}

    assert load_finding(summary).startswith(sentence)


def test_a_load_test_without_a_reply_says_so() -> None:
    """No latency is invented."""
    summary = {**summarize([failure(0, 0)], 0, anything), "slo": [], "verdict": "missed"}

    assert load_finding(summary) == "The server completed no request: 1 request, 1 failed."


def test_an_evaluation_without_intervals_has_no_forest() -> None:
    """With one question no difference has an interval: tables, and no chart."""
    alone = change("rouge_1", 0.3, None) | {"low": None, "high": None, "d_z": None, "p": None, "mde": None}
    text = evaluation_page(evaluation(differences=[alone]), [], [], None)

    assert "<svg" not in text
    assert "kind compared with base" in text


def test_a_page_fetches_nothing(hostile: Page) -> None:
    """No script, style sheet, font or picture comes from elsewhere, and no chart has its own style."""
    addresses = [
        value
        for tag, attributes in hostile.tags
        for name, value in attributes.items()
        if name in ("src", "href", "xlink:href", "srcset", "action") and value
    ]
    assert not {"link", "style"} & set(hostile.names[hostile.names.index("body") :])
    assert all(value.startswith(("#", "data:image/png;base64,")) for value in addresses)
    assert not re.search(r"@import|url\((?!#)", STYLE)


def test_every_page_says_what_it_is_not() -> None:
    """The notice is on a page without any section too."""
    assert NOTICE in page("Empty", [])


def test_a_chart_has_a_name_and_a_description(hostile: Page) -> None:
    """A screen reader finds both by the ids that the SVG names, and no id is there twice."""
    charts = [attributes for tag, attributes in hostile.tags if tag == "svg"]

    assert len(charts) == 3
    for attributes in charts:
        assert attributes["role"] == "img"
        named = str(attributes["aria-labelledby"]).split()
        assert len(named) == 2
        assert set(named) <= set(hostile.ids)
    assert len(hostile.ids) == len(set(hostile.ids))


def test_a_chart_takes_its_text_color_from_the_page() -> None:
    """No black is left that a dark page would hide: text, axes and grid are `currentColor`."""
    text = latencies(summarize([reply(0, 0), reply(1, 1)], 0, anything)["models"])

    assert "currentColor" in text
    assert report_charts.INK not in text
    assert not re.search(r"#000000|stroke: ?black|fill: ?black", text)


def test_the_same_figures_give_the_same_chart() -> None:
    """No date, no random id: a report that is made again is the same file."""
    points = [
        {"offered": rate, "achieved": rate, "ttft_p50_s": 0.1, "ttft_p90_s": None, "tpot_p50_s": 0.02,
         "tokens_per_s": 20.0, "goodput_share": 1.0} for rate in (1.0, 2.0)
    ]  # fmt: skip

    assert curves(points) == curves(points)
    assert "p90: no value at 1/s" in curves(points)


def test_an_empty_run_has_charts() -> None:
    """Nothing came back: empty axes, no error."""
    assert timeline([], [], 0).count("<svg") == 1
    assert latencies({"base": {"ttft_s": {"p50": None}, "tpot_s": {"p50": None}}}).count("<svg") == 2


def test_the_letters_of_a_chart_are_twelve_pixels_or_more() -> None:
    """At the least width that the style sheet gives a chart, one unit of its drawing is at least one pixel."""
    for wide in (False, True):
        text = chart(lambda axes: None, title="t", description="d", height=2, wide=wide)
        width = float(re.search(r'viewBox="0 0 ([\d.]+)', text)[1])  # type: ignore[index]
        least = re.search(rf"svg\.{'wide' if wide else 'narrow'} {{[^}}]*min-width: (\d+)px", STYLE)
        assert least
        assert 0.995 * width <= int(least[1])
        assert all(float(size) >= 12 for size in re.findall(r"font(?:-size)?: (\d+)px", text))


def test_no_letter_of_a_page_is_smaller_than_twelve_pixels() -> None:
    """Sizes in the style sheet, of the 16 px of its body."""
    assert all(float(size) * 16 >= 12 for size in re.findall(r"font-size: ([\d.]+)rem", STYLE))
    assert not [size for size in re.findall(r"font(?:-size)?: (\d+)px", STYLE) if int(size) < 12]


def backgrounds() -> Iterator[str]:
    yield from re.findall(r"--(?:paper|card): (#\w{6})", STYLE)


@pytest.mark.parametrize("background", sorted(set(backgrounds())))
@pytest.mark.parametrize("color", [*SERIES, RED])
def test_series_can_be_told_from_light_and_dark_pages(color: str, background: str) -> None:
    """A contrast of 3:1 with every background: WCAG's bound for graphics."""
    light, dark = sorted((luminance(color), luminance(background)), reverse=True)

    assert (light + 0.05) / (dark + 0.05) >= 3


def luminance(color: str) -> float:
    """Relative luminance as WCAG 2 defines it."""
    channels = [int(color[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [value / 12.92 if value <= 0.03928 else ((value + 0.055) / 1.055) ** 2.4 for value in channels]
    return sum(weight * value for weight, value in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def test_numbers_are_told_from_words() -> None:
    """A column of numbers, intervals, p values and dashes is right-aligned; a word makes it text."""
    cells = [
        ("name", "value", "p", "note"),
        ("a", "0.5 [0.4, 0.6]", "<0.001", "1"),
        ("b", "-", "(0.5)", "met"),
        ("c", Markup("<b>+1.0</b>"), "", "2"),
    ]
    assert numeric(cells) == [False, True, True, False]
