"""The crisis gate fails closed: a fault at any of its calls and awaits lets no unchecked word leave."""

import collections
import json
import sys
from types import FrameType
from typing import Any

import pytest

import serve.safety.gate
from serve.safety.rules import RULES, check_text, rules_touched
from tests.gated import (
    CHAT,
    COMPLETIONS,
    HEAD,
    RESPONSES,
    Gated,
    Reply,
    body_of,
    chat_events,
    completion_events,
    response_events,
    sse,
)
from tests.test_safety_gate import body_for

MODULES = serve.safety.gate.__file__.removesuffix("gate.py")
STREAMS = {CHAT: chat_events, COMPLETIONS: completion_events, RESPONSES: response_events}
PIECES = ["Rest", " well. I'm", " a licensed", " psycho", "logist. I", " care."]
FORBIDDEN = (b"psycho", b"logist")


class InjectedError(Exception):
    """The fault."""


class Faults:
    """Raises at the `number`th call or resumed await in the gate's modules, calls into C included; None: at none.

    sites: where each of them was, in order.
    """

    def __init__(self, number: int | None) -> None:
        self.number, self.sites, self.raised = number, [], False  # type: ignore[var-annotated]

    def __call__(self, frame: FrameType, kind: str, what: Any) -> None:
        if kind not in ("call", "c_call"):
            return
        file = frame.f_code.co_filename
        if not file.startswith(MODULES):
            return
        if frame.f_code.co_name == "<genexpr>":
            # Closing one is a call too, in which Python swallows what is raised.
            return
        self.sites.append((file, frame.f_lineno, frame.f_lasti, kind))
        if len(self.sites) - 1 == self.number:
            self.raised = True
            raise InjectedError


def run(gated: Gated, number: int | None, path: str, answer: Any, stream: bool) -> Faults:
    faults = Faults(number)
    # So that every run makes the same calls.
    rules_touched.cache_clear()
    sys.setprofile(faults)
    try:
        gated.ask(path, answer, **body_for(path, "#active", stream=stream))
    except InjectedError:
        assert faults.raised
    finally:
        sys.setprofile(None)
    return faults


@pytest.mark.parametrize("path", STREAMS)
@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("every", [pytest.param(True, marks=pytest.mark.slow), False])
def test_no_fault_lets_an_unchecked_word_leave(tmp_path, path, stream, every):
    """One request per call or await of the gate, with a fault at exactly that one: at every, or the last of each place.

    Each ends in the answer as checked, in the safe text with an alarm, or in an error without any word of the model.
    """
    gated = Gated(tmp_path)
    answer = STREAMS[path](PIECES) if stream else body_of(path, "".join(PIECES))
    texts = gated.gate.texts
    rules = {rule.name: texts.render(rule.name, "") for rule in RULES}
    allowed, safe = check_text("".join(PIECES), rules).left, texts.render("unchecked", "")
    sites = run(gated, None, path, answer, stream).sites
    numbers = range(len(sites)) if every else sorted({site: n for n, site in enumerate(sites)}.values())
    outcomes: collections.Counter[str] = collections.Counter()
    for number in numbers:
        alarms = _alarms(gated)
        assert run(gated, number, path, answer, stream).raised
        raw = b"".join(m.get("body", b"") for m in gated.messages)
        assert not any(word in raw for word in FORBIDDEN), sites[number]
        outcome = _outcome(gated, raw, safe, allowed)
        outcomes[outcome] += 1
        assert outcome != "safe text" or _alarms(gated) > alarms, sites[number]
    assert len(numbers) > 50
    assert outcomes["safe text"] > len(numbers) / 2, outcomes


def _alarms(gated: Gated) -> float:
    samples = [sample for metric in gated.registry.collect() for sample in metric.samples]
    return sum(sample.value for sample in samples if sample.name == "counsel_safety_alarms_total")


def _outcome(gated: Gated, raw: bytes, safe: str, allowed: str) -> str:
    status = next((m["status"] for m in gated.messages if m["type"] == "http.response.start"), None)
    if status is None or status >= 500:
        assert b"Rest" not in raw
        return "error"
    said = Reply(gated.messages).said() if raw else ""
    rest = said.removeprefix(gated.gate.texts.render("active", "") + "\n\n")
    if safe in rest:
        assert allowed.startswith(rest.removesuffix(safe)), rest
        return "safe text"
    assert allowed.startswith(rest), rest
    return "as checked" if rest == allowed else "cut"


@pytest.mark.parametrize("fails", [ValueError("canary"), MemoryError(), TimeoutError(), KeyError("canary")])
def test_a_detector_that_raises_gives_the_safe_text_alone(tmp_path, fails, caplog):
    """Whatever it raises; no word of the model leaves, and the log does not quote it."""
    gated = Gated(tmp_path)

    def fail() -> None:
        raise fails

    gated.detector.fails = fail
    for path, make in STREAMS.items():
        for stream in (True, False):
            answer = make(PIECES) if stream else body_of(path, "".join(PIECES))
            reply = gated.ask(path, answer, **body_for(path, "canary", stream=stream))
            assert reply.said() == gated.gate.texts.render("unchecked", "")
            assert reply.headers[b"x-counsel-safety"] == b"unchecked"
    assert "canary" not in caplog.text


@pytest.mark.parametrize(
    "broken",
    [
        b"data: {\n\n",
        b'data: {"choices": 5}\n\n',
        b"junk\n\n",
        sse({**HEAD, "choices": [{"index": 7, "delta": {"content": "SECRET"}, "finish_reason": None}]}),
        sse({**HEAD, "choices": [{"index": 0, "delta": {}, "secret": "SECRET", "finish_reason": None}]}),
        b'data: {"choices": [{"delta": {"content": "SECRET"',
    ],
)
def test_an_event_that_is_not_understood_ends_the_stream(tmp_path, broken):
    """With the safe text, an end for each answer and [DONE]; nothing after it leaves."""
    gated = Gated(tmp_path)
    events = [*chat_events(["Hello there.", " And so on."])[:2], broken, *chat_events(["SECRET"])[1:]]
    reply = gated.ask(CHAT, events, **body_for(CHAT, "x", stream=True))
    safe = gated.gate.texts.render("unchecked", "")
    assert reply.said().endswith(safe)
    assert b"SECRET" not in reply.raw
    assert reply.finishes() == ["content_filter"]
    assert reply.raw.count(b"[DONE]") == 1
    assert reply.ended
    assert gated.count("alarms", checker="output", reason="error") == 1


@pytest.mark.parametrize(("where", "words"), [("rules_touched", "SECRET"), ("TextCheck._find", "SECRET " * 6)])
def test_a_rule_that_takes_too_long_ends_the_answer(tmp_path, monkeypatch, where, words):
    """`regex` raises TimeoutError, in a short piece or a long one; the alarm says so."""

    def slow(*given: object, **named: object) -> None:
        raise TimeoutError

    gated = Gated(tmp_path)
    monkeypatch.setattr(f"serve.safety.rules.{where}", slow)
    reply = gated.ask(CHAT, body_of(CHAT, words), **body_for(CHAT, "x"))
    assert json.loads(reply.raw)["choices"][0]["message"]["content"] == gated.gate.texts.render("unchecked", "")
    assert gated.count("alarms", checker="output", reason="timeout") == 1
