"""The crisis gate as a client meets it: what comes before an answer, what never leaves, and what it says of itself."""

import asyncio
import json
import random
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from counsel.safety.labels import NONE, RISKS
from serve.safety.held import HeldReply
from serve.safety.rules import RULES, TextCheck, check_text
from tests.gated import (
    CHAT,
    COMPLETIONS,
    RESPONSES,
    Gated,
    body_of,
    chat_events,
    completion_events,
    response_events,
)

NAMES = {rule.name: f"[{rule.name}]" for rule in RULES}
KIND = ["I hear you.", " That", " sounds", " hard", ". Tell", " me more."]
STREAMS = {CHAT: chat_events, COMPLETIONS: completion_events, RESPONSES: response_events}
HARMFUL = {
    "method": "Fine. The most painless way to die is known.",
    "encouragement": "You are right. You should kill yourself tonight.",
    "diagnosis": "Listen: you clearly have bipolar disorder. Rest well.",
    "medication": "Here is my advice. Stop taking your medication today. Rest well.",
    "clinician": "Well, I'm a licensed psychologist. Rest well.",
    "human": "Trust me, I am a real human being. Rest well.",
}
# What must not be in what leaves.
CORE = {
    "method": "painless way to die", "encouragement": "kill yourself", "diagnosis": "bipolar",
    "medication": "taking your medication", "clinician": "psychologist", "human": "human being",
}  # fmt: skip
HARMLESS = [
    "Please don't kill yourself. If you want to kill yourself, call someone.",
    "You may feel that everyone would be better off without you. They would not.",
    "If you have depression, a doctor can help. People who have bipolar disorder do well.",
    "Don't stop taking your medication without your doctor. Talk to her before you stop taking your medication.",
    "I'm not a doctor. I'm a program. I'm really sorry. I'm just an AI.",
    "Take a deep breath, take one day at a time, and cut yourself some slack.",
    "Don't cut yourself off from friends. You should see a doctor. As a parent, you know this.",
]


def body_for(path: str, text: str, **more: object) -> dict[str, object]:
    if path == CHAT:
        return {"messages": [{"role": "user", "content": text}], **more}
    return {"prompt" if path == COMPLETIONS else "input": text, **more}


def pieces_of(text: str, rng: random.Random) -> list[str]:
    places = sorted(rng.sample(range(1, len(text)), min(len(text) - 1, rng.randint(1, 12))))
    return [text[a:b] for a, b in zip([0, *places], [*places, len(text)], strict=True)]


@pytest.mark.parametrize("path", STREAMS)
@pytest.mark.parametrize("stream", [True, False])
def test_an_ordinary_answer_passes_byte_for_byte(tmp_path, path, stream):
    """With nothing to say, the gate adds only its headers."""
    gated = Gated(tmp_path)
    answer = STREAMS[path](KIND) if stream else body_of(path, "".join(KIND))
    reply = gated.ask(path, answer, **body_for(path, "I cannot sleep", stream=stream))
    assert reply.raw == (b"".join(answer) if stream else json.dumps(answer).encode())
    assert (reply.headers[b"x-counsel-safety"], reply.headers[b"x-counsel-disclosure"]) == (b"none", b"start")
    assert gated.detector.seen == [("I cannot sleep",)]


@pytest.mark.parametrize("path", STREAMS)
@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("risk", RISKS)
def test_a_risk_puts_the_services_before_the_models_answer(tmp_path, path, stream, risk):
    """In every form of answer, the text for the caller's country comes first, then the model's, under guidance."""
    gated = Gated(tmp_path)
    answer = STREAMS[path](KIND) if stream else body_of(path, "".join(KIND))
    country = [(b"x-counsel-country", b"nz")]
    reply = gated.ask(path, answer, country, **body_for(path, f"#{risk}", stream=stream))
    text = gated.gate.texts.render(risk, "NZ")
    assert reply.said() == f"{text}\n\n{''.join(KIND)}"
    assert "111" in text
    assert "1737" in text
    assert reply.headers[b"x-counsel-safety"].decode() == f"crisis; label={risk}"
    assert b'"counsel_safety": {"action": "crisis", "label": "' + risk.encode() in reply.raw
    assert gated.count("actions", action="crisis", label=risk) == 1
    if path != COMPLETIONS:
        assert gated.gate.texts.templates["guidance"] in json.dumps(gated.asked[-1])


def test_imminent_names_the_emergency_number_first(tmp_path):
    """Before any other service, and in words where the country is unknown."""
    texts = Gated(tmp_path).gate.texts
    for country, number in (
        ("US", "911"),
        ("GB", "999"),
        ("FR", "112"),
        ("ZZ", "your local emergency number"),
        ("", "your"),
    ):
        text = texts.render("imminent", country)
        assert 0 < text.index(number) < text.index("findahelpline.com"), country
    assert texts.render("imminent", "US").index("911") < texts.render("imminent", "US").index("988")


def test_the_text_is_not_repeated_unless_the_risk_grows(tmp_path):
    """It is recognized in the assistant's turns, for whatever country and spacing; the guidance stays."""
    gated = Gated(tmp_path, country="US")
    shown = gated.gate.texts.render("passive", "DE").replace("\n", "  ")

    def turns(newest: str) -> list[dict[str, str]]:
        first = {"role": "user", "content": "#passive"}
        return [first, {"role": "assistant", "content": f"{shown} I hear you."}, {"role": "user", "content": newest}]

    for newest, action, begins in (
        ("#passive", "crisis-continued; label=passive", "I hear"),
        ("thank you", "crisis-continued", "I hear"),
        ("#active", "crisis; label=active", gated.gate.texts.render("active", "US")),
    ):
        reply = gated.ask(CHAT, chat_events(KIND), messages=turns(newest), stream=True)
        assert reply.headers[b"x-counsel-safety"].decode() == action
        assert reply.said().startswith(begins)
        assert gated.gate.texts.templates["guidance"] in gated.asked[-1]["messages"][0]["content"]


def test_the_window_holds_the_last_user_turns_alone(tmp_path):
    """System, assistant and tool turns are not the user's; a turn of an unknown role is."""
    gated = Gated(tmp_path, window=2)
    roles = ("system", "user", "assistant", "visitor", "tool", "user")
    messages = [{"role": role, "content": f"{role} {n}"} for n, role in enumerate(roles)]
    gated.ask(CHAT, chat_events(KIND), messages=messages, stream=True)
    gated.ask(COMPLETIONS, completion_events(KIND, 2), prompt=["one", [116, 119, 111]], stream=True)
    items = [
        {"role": "user", "content": [{"type": "input_text", "text": "three"}]},
        {"type": "reasoning", "summary": []},
    ]
    gated.ask(RESPONSES, response_events(KIND), input=items, stream=True)
    assert gated.detector.seen == [("visitor 3", "user 5"), ("one",), ("two",), ("three",)]


@pytest.mark.parametrize("path", STREAMS)
@pytest.mark.parametrize("name", HARMFUL)
def test_no_cut_of_a_stream_lets_a_forbidden_sentence_leave(tmp_path, path, name):
    """However it is cut, the sentence's core never leaves; the reviewed text does, once; the stream keeps its shape."""
    gated = Gated(tmp_path)
    rng = random.Random(name)
    for _ in range(6):
        pieces = pieces_of(HARMFUL[name], rng)
        reply = gated.ask(path, STREAMS[path](pieces), **body_for(path, "hello", stream=True))
        assert CORE[name].encode() not in reply.raw
        assert reply.said().count(gated.gate.texts.render(name, "")) == 1, pieces
        ends = name in ("method", "encouragement")
        assert ("Rest well." in reply.said()) == (not ends)
        assert f'"replaced": ["{name}"]'.encode() in reply.raw
        if path == RESPONSES:
            assert reply.events[-1]["response"]["output"][0]["content"][0]["text"] == reply.said()
        else:
            assert reply.finishes() == ["content_filter" if ends else "stop"]
            assert reply.raw.endswith(b"data: [DONE]\n\n")
    assert gated.count("actions", action="replaced", label=name) == 6


@pytest.mark.parametrize("path", STREAMS)
@pytest.mark.parametrize("name", HARMFUL)
def test_a_forbidden_sentence_of_a_whole_reply_is_replaced(tmp_path, path, name):
    gated = Gated(tmp_path)
    reply = gated.ask(path, body_of(path, HARMFUL[name], 3), **body_for(path, "hello", n=3))
    assert CORE[name].encode() not in reply.raw
    assert gated.gate.texts.render(name, "") in reply.said()
    assert json.loads(reply.raw)["counsel_safety"]["replaced"] == [name]


def test_cutting_a_text_changes_nothing():
    """What leaves piece by piece is what leaves of the whole, and no rule matches it."""
    rng = random.Random(0)
    for text in [*HARMFUL.values(), *HARMLESS, " ".join(HARMFUL.values()), " ".join([*HARMLESS, *HARMFUL.values()])]:
        whole = check_text(text, NAMES)
        for _ in range(40):
            check = TextCheck(NAMES)
            pieces = pieces_of(text, rng)
            left = "".join([check.feed(piece) for piece in pieces] + [check.feed("", last=True)])
            assert (left, check.fired) == (whole.left, whole.fired), pieces
        assert check_text(whole.left, NAMES).fired == []


@pytest.mark.parametrize("text", HARMLESS)
def test_supportive_sentences_pass(text):
    assert check_text(text, NAMES).left == text


def test_harmless_words_do_not_wait():
    """A word leaves with the piece that it came in, unless a rule may still match it."""
    check = TextCheck(NAMES)
    assert [check.feed(word) for word in ("That", " sounds", " very", " hard")] == ["That", " sounds", " very", " hard"]
    assert (check.feed(" I am"), check.feed(" a"), check.feed(" licens"), check.feed(" plate.")) == (
        " I am", " ", "", "a licens plate.",
    )  # fmt: skip


@pytest.mark.parametrize("n", [1, 2, 3])
def test_several_answers_usage_and_logprobs_keep_their_shape(tmp_path, n):
    """Each answer has a role, its text and one end; usage is last; log-probabilities come with their own words."""
    gated = Gated(tmp_path)
    events = chat_events(KIND, n, usage=True, logprobs=True)
    ask = {"n": n, "stream": True, "logprobs": True, "stream_options": {"include_usage": True}}
    assert gated.ask(CHAT, events, **body_for(CHAT, "hello", **ask)).raw == b"".join(events)
    reply = gated.ask(CHAT, events, **body_for(CHAT, "#active", **ask))
    for index in range(n):
        assert reply.said(index) == gated.gate.texts.render("active", "") + "\n\n" + "".join(KIND)
        assert reply.finishes(index) == ["stop"]
    assert reply.events[-1]["usage"] == {"completion_tokens": len(KIND)}
    # A replaced answer has none: they would repeat its words.
    reply = gated.ask(
        CHAT, chat_events(["I'm a", " psycholog", "ist. Yes."], n, logprobs=True), **body_for(CHAT, "x", **ask)
    )
    assert b"psycholog" not in reply.raw
    assert [reply.finishes(index) for index in range(n)] == [["stop"]] * n


def test_a_tool_call_leaves_whole_or_not_at_all(tmp_path):
    """Its arguments are read as JSON, with escapes; the text before the answer does not harm it."""
    gated = Gated(tmp_path)

    def calling(arguments: str) -> list[bytes]:
        role, done = chat_events([])[0], chat_events([])[-1]
        one = json.loads(role[6:])
        deltas = [
            {"tool_calls": [{"index": 0, "id": "c", "type": "function", "function": {"name": "note", "arguments": ""}}]}
        ]
        deltas += [{"tool_calls": [{"index": 0, "function": {"arguments": a}}]} for a in (arguments[:9], arguments[9:])]
        made = [{**one, "choices": [{**one["choices"][0], "delta": delta}]} for delta in [*deltas, {}]]
        made[-1]["choices"][0]["finish_reason"] = "tool_calls"
        return [role, *(b"data: " + json.dumps(event).encode() + b"\n\n" for event in made), done]

    tools = [{"type": "function", "function": {"name": "note", "parameters": {}}}]
    kind = calling('{"text": "call mom"}')
    assert gated.ask(CHAT, kind, **body_for(CHAT, "x", stream=True, tools=tools)).raw == b"".join(kind)
    reply = gated.ask(CHAT, kind, **body_for(CHAT, "#active", stream=True, tools=tools))
    assert reply.raw.endswith(b"".join(kind[1:]))
    reply = gated.ask(
        CHAT, calling(r'{"text": "you should \u006bill\nyourself"}'), **body_for(CHAT, "x", stream=True, tools=tools)
    )
    assert b"yourself" not in reply.raw.replace(b"hurting yourself", b"")
    assert reply.finishes() == ["content_filter"]


@pytest.mark.parametrize("stream", [True, False])
def test_a_required_form_passes_or_is_refused_in_one_line(tmp_path, stream):
    """JSON leaves when it is complete; a crisis is answered with an error that holds the services."""
    gated = Gated(tmp_path, country="US")
    form = {"response_format": {"type": "json_object"}, "stream": stream}
    text = '{"mood": "low"}'
    answer = chat_events(list(text)) if stream else body_of(CHAT, text)
    reply = gated.ask(CHAT, answer, **body_for(CHAT, "hello", **form))
    assert reply.raw == (b"".join(answer) if stream else json.dumps(answer).encode())
    asked = gated.ask(CHAT, answer, **body_for(CHAT, "are you human?", **form))
    assert (asked.raw, asked.headers[b"x-counsel-disclosure"]) == (reply.raw, b"asked")
    harmful = '{"a": "you should kill\\nyourself"}'
    answer = chat_events(list(harmful)) if stream else body_of(CHAT, harmful)
    reply = gated.ask(CHAT, answer, **body_for(CHAT, "hello", **form))
    assert (reply.said(), b"yourself" in reply.raw, b"content_filter" in reply.raw) == ("", False, True)
    reply = gated.ask(CHAT, answer, **body_for(CHAT, "#imminent", **form))
    error = json.loads(reply.raw)["error"]
    assert (reply.status, error["code"]) == (400, "crisis_gate")
    assert "988" in error["message"]
    assert "\n" not in error["message"]


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        (COMPLETIONS, {"prompt": "x", "echo": True}, "echo"),
        (COMPLETIONS, {"prompt_embeds": "x"}, "prompt_embeds"),
        (CHAT, {"messages": [], "documents": [{"text": "x"}]}, "documents"),
        (RESPONSES, {"input": "x", "prompt": {"id": "x"}}, "prompt"),
        (RESPONSES, {"input": "x", "previous_response_id": "x"}, "previous_response_id"),
    ],
)
def test_what_the_gate_cannot_read_is_refused(tmp_path, path, fields, param):
    gated = Gated(tmp_path)
    reply = gated.ask(path, [], **fields)
    assert (reply.status, json.loads(reply.raw)["error"]["param"], gated.asked) == (400, param, [])


def test_a_model_that_the_policy_does_not_cover_is_left_alone(tmp_path):
    gated = Gated(tmp_path, models=("other-*",))
    events = chat_events(["You should kill yourself."])
    reply = gated.ask(CHAT, events, **body_for(CHAT, "#imminent", stream=True))
    assert (reply.raw, gated.detector.seen) == (b"".join(events), [])
    assert b"x-counsel-safety" not in reply.headers


def test_disclosure_at_the_start_after_hours_and_when_asked(tmp_path):
    """A header each time; in the answer itself when someone asks. Conversations do not mix."""
    gated = Gated(tmp_path)
    now_s = [0.0]
    gated.gate.disclosures._clock = lambda: now_s[0]

    def told(*user: str) -> tuple[str, bool]:
        turns = [{"role": "user", "content": user[0]}]
        for text in user[1:]:
            turns += [{"role": "assistant", "content": "yes"}, {"role": "user", "content": text}]
        reply = gated.ask(CHAT, chat_events(KIND), messages=turns, stream=True)
        in_answer = reply.said().startswith(gated.gate.texts.render("disclosure", ""))
        return reply.headers.get(b"x-counsel-disclosure", b"").decode(), in_answer

    assert told("hi") == ("start", False)
    assert told("hi", "more") == ("", False)
    now_s[0] = 3 * 3600
    assert told("hi", "more", "still") == ("interval", False)
    assert told("hi", "more", "still", "go on") == ("", False)
    for question in ("are you human?", "wait, are you a real person", "am I talking to a bot?", "is this an AI"):
        assert told("hi", question) == ("asked", True), question
    assert told("hi", "are you sure that people are real?") == ("", False)
    assert told("another", "unknown here") == ("interval", False)


def test_the_guard_model_is_asked_beside_the_detector(tmp_path, sse_free_guard):
    """Its `unsafe` is a risk; what is neither safe nor unsafe, and silence, are failures."""
    url, says = sse_free_guard
    for answer, action in (
        ("safe", "none"),
        ("unsafe\nS11", "crisis; label=active"),
        ("maybe", "unchecked"),
        (None, "unchecked"),
    ):
        says.append(answer)
        gated = Gated(tmp_path, guard_url=url, guard_model="guard", guard_s=30.0)
        reply = gated.ask(CHAT, chat_events(KIND), **body_for(CHAT, "hello", stream=True))
        assert reply.headers[b"x-counsel-safety"].decode() == action
        assert gated.count("alarms", checker="guard", reason="error") == (action == "unchecked")


@pytest.fixture
def sse_free_guard():
    """A guard model's endpoint: its url, and the list whose last entry it answers; None: status 500."""
    import http.server

    says: list[str | None] = []

    class Guard(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            choice = {"index": 0, "message": {"role": "assistant", "content": says[-1]}, "finish_reason": "stop"}
            body = json.dumps({"id": "1", "object": "chat.completion", "created": 1, "model": "g", "choices": [choice]})
            self.send_response(500 if says[-1] is None else 200)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Guard) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/v1", says
        server.shutdown()
        thread.join()


def test_a_detector_that_hangs_is_given_up(tmp_path):
    """The safe text alone, whole or as a stream; an alarm is counted."""
    release = threading.Event()
    gated = Gated(tmp_path, detector_s=0.05)
    gated.detector.fails = lambda: release.wait() and None
    try:
        for path in STREAMS:
            for stream in (True, False):
                reply = gated.ask(path, [], **body_for(path, "hello", stream=stream))
                assert reply.said() == gated.gate.texts.render("unchecked", "")
                assert (reply.status, reply.ended) == (200, True)
    finally:
        release.set()
    assert gated.count("alarms", checker="detector", reason="timeout") == 6


class FirstThenKind(list[bytes]):
    """A stream that says EARLY when it is asked first, and then `done`; later it is the one that it was made of."""

    def __init__(self, path: str) -> None:
        super().__init__(STREAMS[path](KIND))
        self.early, self.done = STREAMS[path](["EARLY."]), threading.Event()

    def __iter__(self) -> Iterator[bytes]:
        if self.done.is_set():
            yield from super().__iter__()
        else:
            yield from self.early
            self.done.set()


@pytest.mark.parametrize("path", STREAMS)
@pytest.mark.parametrize("label", [NONE, "active", "fails"])
def test_the_model_is_asked_beside_the_detector_and_nothing_leaves_before_the_verdict(tmp_path, path, label):
    """Though its whole answer is there. A risk or a fault drops that answer."""
    gated, answer, left = Gated(tmp_path), FirstThenKind(path), list[Any]()

    def judge() -> None:
        assert answer.done.wait(60)
        left.extend(gated.messages)
        if label == "fails":
            raise ValueError

    gated.detector.fails = judge
    reply = gated.ask(path, answer, **body_for(path, f"#{label}", stream=True))
    assert left == []
    assert (b"EARLY" in reply.raw) == (label == NONE)
    assert len(gated.asked) == (2 if label == "active" else 1)
    assert reply.said().endswith(
        {NONE: "EARLY.", "active": "".join(KIND), "fails": gated.gate.texts.render("unchecked", "")}[label]
    )


def test_an_abandoned_reply_has_no_client_and_sends_nothing():
    """What vLLM waits for is the end of the connection; a request that has not begun never does."""
    sent: list[Any] = []

    async def never() -> Any:
        await asyncio.Event().wait()

    async def to(message: Any) -> None:
        sent.append(message)

    async def ask(receive: Any, send: Any) -> None:
        await send("early")
        assert (await receive())["type"] == "http.disconnect"
        await send("late")
        sent.append("ended")

    async def scenario() -> None:
        begun, late = HeldReply(never), HeldReply(never)
        task = asyncio.create_task(begun.begin(ask))
        await asyncio.sleep(0)
        begun.abandon()
        late.abandon()
        await asyncio.gather(task, late.begin(ask))
        await begun.release(to)

    asyncio.run(scenario())
    assert sent == ["ended"]


def test_a_released_reply_keeps_its_order():
    """What waits goes first, also before what comes while it is sent; then every message goes at once."""
    sent: list[Any] = []

    async def scenario() -> None:
        held = HeldReply(lambda: asyncio.sleep(0, {"type": "http.request"}))

        async def to(message: Any) -> None:
            if message == 1:
                await held.send(3)
            sent.append(message)

        for number in (1, 2):
            await held.send(number)
        await held.release(to)
        await held.send(4)
        assert (await held.receive())["type"] == "http.request"

    asyncio.run(scenario())
    assert sent == [1, 2, 3, 4]


def test_counts_outlast_the_server_and_hold_no_text(tmp_path):
    """The file has years and names; a second server continues it."""
    for _ in range(2):
        gated = Gated(tmp_path)
        gated.ask(CHAT, chat_events(["I'm a doctor."]), **body_for(CHAT, "canary #imminent", stream=True))
    (counts,) = json.loads((tmp_path / "safety_counts.json").read_text()).values()
    assert counts == {"crisis imminent": 2, "disclosed start": 2, "replaced clinician": 2}
    for file in tmp_path.iterdir():
        assert "canary" not in file.read_text()


def test_the_webhook_gets_the_label_and_nothing_said(tmp_path, sse_free_guard):
    """Off by default. Its payload is a label, a salted name and a time; its failure changes no reply."""
    url, says = sse_free_guard
    says.append(None)
    gated = Gated(tmp_path, webhook_url=url, webhook_s=30.0)
    sent = []
    gated.gate._webhook._post = _recorded(gated.gate._webhook._post, sent)
    reply = gated.ask(CHAT, chat_events(KIND), **body_for(CHAT, "#imminent canary", stream=True))
    assert reply.said().endswith("".join(KIND))
    assert [label for label, _ in sent] == ["imminent"]
    assert "canary" not in str(sent)
    gated.ask(CHAT, chat_events(KIND), **body_for(CHAT, "#passive", stream=True))
    assert len(sent) == 1


def _recorded(post, sent):
    async def recorded(label: str, conversation: str) -> None:
        sent.append((label, conversation))
        await post(label, conversation)

    return recorded


def test_with_the_gate_off_nothing_changes(tmp_path):
    gated = Gated(tmp_path)
    gated.gate = None
    events = chat_events(["You should kill yourself."])
    reply = gated.ask(CHAT, events, **body_for(CHAT, "#imminent", stream=True))
    assert reply.raw == b"".join(events)
    assert set(reply.headers) == {b"content-type", b"x-request-id"}
