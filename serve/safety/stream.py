"""The output check of a chat or completions stream: events leave as they came, once their words may.

Each event waits until every word in it is decided (serve/safety/rules.py); then it leaves byte for byte, with its
log-probabilities. When a rule matches, the rest of that answer is written anew, without them. Tool calls, and answers
of a required form, leave when their answer is complete. Anything that is not understood raises ValueError.
"""

import json
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from serve.request_rewrite import Body
from serve.safety.rules import TextCheck, WholeCheck
from serve.safety.shapes import DONE, FIELD, FILTERED, SPOKEN, Place, chunk, event, words_in


class Verdict:
    """What was decided about one reply: how the gate acted before it, and the rules that it broke."""

    def __init__(self, field: Mapping[str, Any], texts: Mapping[str, str], *, structured: bool) -> None:
        """`field`: the reply's `counsel_safety` so far. `texts`: of each rule, by its name."""
        self.texts, self.structured = texts, structured
        self.fired: list[str] = []
        # Told of each rule that matched, once per reply.
        self.on_replaced: Callable[[str], None] = lambda name: None
        self._field = field

    def add(self, names: Iterable[str]) -> None:
        """Note the rules that a text broke."""
        for name in names:
            if name not in self.fired:
                self.fired.append(name)
                self.on_replaced(name)

    def field(self) -> Body:
        """What the reply's field `counsel_safety` says."""
        return {**self._field, **({"replaced": list(self.fired)} if self.fired else {})}

    def new_check(self, place: Place) -> TextCheck:
        """A check for the text at a place of the answer."""
        spoken = not self.structured and len(place) > 0 and place[-1] in SPOKEN
        return TextCheck(self.texts) if spoken else WholeCheck(self.texts)


class StreamCheck:
    """One stream. `feed` takes an event and returns those that may leave; `failed` ends it with a text of ours."""

    def __init__(self, path: str, head: Body, n: int, prefix: str, verdict: Verdict) -> None:
        """`head`: how a chunk begins, until the model's own is known. `prefix`: the text before each of `n` answers."""
        self.path, self.head, self.prefix, self.verdict = path, head, prefix, verdict
        self._answers = {index: _Answer(self, index) for index in range(n)}

    def feed(self, raw: bytes) -> list[bytes]:
        """The events that may leave now. Raises ValueError for one that is not understood."""
        if raw.startswith(b":"):
            return [raw]
        if not raw.startswith(b"data: "):
            raise ValueError("an event without data")
        if raw == DONE:
            return [*self.end(), raw]
        data = json.loads(raw[6:])
        if "error" in data:
            self._answers.clear()
            return [raw]
        if not data["choices"]:
            return [raw]
        (choice,) = data["choices"]
        self.head = {name: data[name] for name in self.head}
        return self._answers[choice["index"]].feed(raw, data, choice)

    def end(self) -> list[bytes]:
        """What may still leave once the model has ended, also where it did not say so."""
        return [out for answer in self._answers.values() for out in answer.flush()]

    def failed(self, text: str) -> list[bytes]:
        """The stream's end after a fault: `text` in every answer that has not ended."""
        open_answers = [index for index, answer in self._answers.items() if not answer.finished]
        field = self.verdict.field()
        return [*(chunk(self.path, self.head, index, text, FILTERED, field=field) for index in open_answers), DONE]


class _Answer:
    """One of a stream's answers."""

    def __init__(self, stream: StreamCheck, index: int) -> None:
        self.stream, self.index = stream, index
        self.finished = False
        self._started = self._rewriting = False
        self._checks: dict[Place, TextCheck] = {}
        # Events that wait, with how much of each text must be decided before they may leave.
        self._waiting: deque[tuple[bytes, dict[Place, int]]] = deque()
        self._sent: dict[Place, int] = {}

    def feed(self, raw: bytes, data: Body, choice: Body) -> list[bytes]:
        said = choice["delta"] if "delta" in choice else {"text": choice["text"]}
        pieces = {place: words for place, words in words_in(said) if words}
        if others := set(choice) - {"index", "delta", "text", "logprobs", "finish_reason", "stop_reason", "token_ids",
                                    "prompt_token_ids", "prompt_logprobs", "routed_experts"}:  # fmt: skip
            raise ValueError(f"a choice with {min(others)}")
        before: list[bytes] = []
        if not self._started:
            self._started = True
            before = self._opening(raw, pieces)
            if before and before[0] is raw:
                return before
        last = choice["finish_reason"] is not None
        ends: dict[Place, int] = {}
        for place, words in pieces.items():
            check = self._checks.get(place)
            if check is None:
                check = self._checks[place] = self.stream.verdict.new_check(place)
            check.feed(words)
            ends[place] = len(check.raw)
        if last:
            self._decide_all()
        self._waiting.append((raw, ends))
        self._rewriting = self._rewriting or any(check.fired for check in self._checks.values())
        if self._rewriting:
            return before + self._rewritten(data, choice["finish_reason"])
        self.finished = last
        return before + self._released()

    def flush(self) -> list[bytes]:
        """What may leave once the model has ended."""
        if self.finished:
            return []
        self._decide_all()
        self.finished = True
        if any(check.fired for check in self._checks.values()):
            return self._rewritten({**self.stream.head, "choices": []}, FILTERED)
        return self._released()

    def _opening(self, raw: bytes, pieces: dict[Place, str]) -> list[bytes]:
        if not self.stream.prefix:
            return []
        stream = self.stream
        prefix = chunk(stream.path, stream.head, self.index, stream.prefix, field=stream.verdict.field())
        # A chat's first event only names the role.
        return [raw, prefix] if not pieces and b'"role"' in raw else [prefix]

    def _decide_all(self) -> None:
        for check in self._checks.values():
            check.feed("", last=True)

    def _released(self) -> list[bytes]:
        out = []
        while self._waiting:
            raw, ends = self._waiting[0]
            if any(self._checks[place].decided < end for place, end in ends.items()):
                break
            out.append(raw)
            self._sent |= ends
            self._waiting.popleft()
        return out

    def _rewritten(self, data: Body, finish: str | None) -> list[bytes]:
        """The words that may leave, in an event of ours; then, with the last, the tool calls, if nothing is wrong."""
        verdict = self.stream.verdict
        spoken = {place: check for place, check in self._checks.items() if not isinstance(check, WholeCheck)}
        whole = [check for check in self._checks.values() if isinstance(check, WholeCheck)]
        said: Body = {}
        for place, check in spoken.items():
            if new := check.left[self._sent.get(place, 0) :]:
                said[str(place[-1])] = new
                self._sent[place] = len(check.left)
        verdict.add(name for check in self._checks.values() for name in check.fired)
        blocked = any(check.ended for check in self._checks.values())
        calls = deque(pair for pair in self._waiting if any(place not in spoken for place in pair[1]))
        if finish is None:
            self._waiting = calls
            return [self._event(data, said, None)] if said else []
        self.finished = True
        self._waiting.clear()
        if any(check.fired for check in whole) and not verdict.structured:
            # What was blocked is not a sentence in a text: say so in one.
            name = next(name for check in whole for name in check.fired)
            said["text" if "text" in said else "content"] = said.get("content", "") + verdict.texts[name]
        out = [self._event(data, said, None)] if said else []
        if not blocked:
            out += [_call_alone(raw) for raw, _ in calls]
        return [*out, self._event(data, {}, FILTERED if blocked else finish)]

    def _event(self, data: Body, said: Body, finish: str | None) -> bytes:
        is_chat = self.stream.path.endswith("/chat/completions")
        content: Body = {"delta": said} if is_chat else {"text": said.get("text", "")}
        choice = {"index": self.index, **content, "logprobs": None, "finish_reason": finish}
        kept = {name: value for name, value in data.items() if name not in ("choices", "prompt_token_ids")}
        return event({**kept, "choices": [choice], FIELD: self.stream.verdict.field()})


def _call_alone(raw: bytes) -> bytes:
    """The event of a tool call without a text and an end that it may also hold."""
    data = json.loads(raw[6:])
    (choice,) = data["choices"]
    choice["delta"] = {name: value for name, value in choice["delta"].items() if name not in SPOKEN}
    choice["finish_reason"] = None
    return event(data)
