"""The output check of a /v1/responses stream: the same as serve/safety/stream.py, in that API's events.

A text before the answer is an output item of its own, in front of the model's. Events that repeat a text when it is
done repeat what has left of it.
"""

import json
from collections import deque
from typing import Any

from serve.request_rewrite import Body
from serve.safety.rules import TextCheck, WholeCheck, check_text
from serve.safety.shapes import (
    FIELD,
    FILTERED,
    Place,
    event,
    item_events,
    message_item,
    response_of,
    words_in,
    words_replaced,
)
from serve.safety.stream import Verdict

_OPENING = ("response.created", "response.queued", "response.in_progress")
_SPOKEN = ("response.output_text", "response.reasoning_text", "response.reasoning_summary_text", "response.refusal",
           "response.reasoning_part", "response.reasoning")  # fmt: skip
_LAST = ("response.completed", "response.incomplete", "response.failed")
_N_ITEM_EVENTS = 6


class ResponsesCheck:
    """One stream. `feed` takes an event and returns those that may leave; `failed` ends it with a text of ours."""

    def __init__(self, head: Body, prefix: str, verdict: Verdict) -> None:
        """`head`: id, time and model for events of ours. `prefix`: the text before the answer."""
        self.head, self.prefix, self.verdict = head, prefix, verdict
        self._checks: dict[Place, TextCheck] = {}
        self._waiting: deque[tuple[bytes, Body, Place, int]] = deque()
        self._sent: dict[Place, int] = {}
        self._opened = False
        self._shift = self._n_sent = 0
        self._response: Body = {}

    def feed(self, raw: bytes) -> list[bytes]:
        """The events that may leave now. Raises ValueError for one that is not understood."""
        if raw.startswith(b":"):
            return [raw]
        _, found, payload = raw.partition(b"data: ")
        if not found:
            raise ValueError("an event without data")
        data = json.loads(payload)
        kind = data["type"]
        if kind == "error":
            self._waiting.clear()
            return [raw]
        if kind in _OPENING:
            self._response = data["response"]
            self._refuse_words(data["response"].get("output"))
            self._n_sent += 1
            return [raw]
        before: list[bytes] = []
        if not self._opened:
            self._opened = True
            if self.prefix:
                self._shift = _N_ITEM_EVENTS
                before = item_events(self.head, self.prefix, data["sequence_number"])
                self._n_sent += len(before)
        base, _, step = kind.rpartition(".")
        if step == "delta":
            out = self._delta(raw, data, base)
        elif kind in _LAST:
            out = [*self._flush(), self._last(raw, data)]
        else:
            out = [*self._flush(), self._repeat(raw, data)]
        self._n_sent += len(out)
        return before + out

    def end(self) -> list[bytes]:
        """What may still leave once the model has ended, also where it did not say so."""
        return self._flush()

    def failed(self, text: str) -> list[bytes]:
        """The stream's end after a fault: an item of ours with `text`, and the response with it alone."""
        events = item_events(self.head, text, self._n_sent, index=99)
        response = {**response_of(self.head, "completed", [message_item(self.head, text)]), FIELD: self.verdict.field()}
        if "id" in self._response:
            response |= {"id": self._response["id"], "created_at": self._response["created_at"]}
        last = {"type": "response.completed", "sequence_number": self._n_sent + len(events), "response": response}
        return [*events, event(last, "response.completed")]

    def _delta(self, raw: bytes, data: Body, base: str) -> list[bytes]:
        place: Place = (data.get("output_index", 0), data.get("content_index", 0), base)
        check = self._checks.get(place)
        if check is None:
            spoken = base in _SPOKEN and not self.verdict.structured
            check = self._checks[place] = TextCheck(self.verdict.texts) if spoken else WholeCheck(self.verdict.texts)
        if not isinstance(data["delta"], str):
            raise ValueError("a delta that is not text")
        check.feed(data["delta"])
        self._waiting.append((raw, data, place, len(check.raw)))
        return self._released()

    def _released(self) -> list[bytes]:
        out = []
        while self._waiting:
            raw, data, place, end = self._waiting[0]
            check = self._checks[place]
            if not check.fired and check.decided < end:
                break
            self._waiting.popleft()
            if not check.fired:
                self._sent[place] = end
                out.append(self._shifted(raw, data))
                continue
            self.verdict.add(check.fired)
            if new := check.left[self._sent.get(place, 0) :]:
                self._sent[place] = len(check.left)
                out.append(self._written({**data, "delta": new, "logprobs": []}))
        return out

    def _flush(self) -> list[bytes]:
        """The end of a text, a part or an item: every text so far is complete."""
        for check in self._checks.values():
            check.feed("", last=True)
        out = self._released()
        for place, check in self._checks.items():
            # A text of ours that ends an answer may come with no more delta.
            if check.fired and (new := check.left[self._sent.get(place, 0) :]):
                self._sent[place] = len(check.left)
                index, part, base = place
                delta: Body = {"type": f"{base}.delta", "output_index": index, "content_index": part, "item_id": "",
                         "sequence_number": self._n_sent, "delta": new, "logprobs": []}  # fmt: skip
                out.append(self._written(delta))
        return out

    def _repeat(self, raw: bytes, data: Body) -> bytes:
        parts = {name: data[name] for name in data if name not in ("type", "sequence_number", "item_id")}
        replaced = self._as_left(parts)
        return self._shifted(raw, data) if replaced is None else self._written({**data, **replaced})

    def _last(self, raw: bytes, data: Body) -> bytes:
        response = data["response"]
        replaced = self._as_left({"output": response.get("output")})
        if replaced is None and not self.prefix and not self.verdict.fired:
            return raw
        response = {**response, **(replaced or {}), FIELD: self.verdict.field()}
        if any(check.ended for check in self._checks.values()):
            response["incomplete_details"] = {"reason": FILTERED}
        if self.prefix:
            response["output"] = [message_item(self.head, self.prefix), *(response["output"] or [])]
        return self._written({**data, "response": response})

    def _as_left(self, part: Any) -> Any:
        """The part with each text as it has left; None if nothing is different."""
        left = {check.raw: check.left for check in self._checks.values()}
        by = {}
        for place, words in words_in(part):
            as_left = left[words] if words in left else check_text(words, self.verdict.texts).left
            if as_left != words:
                by[place] = as_left
        return words_replaced(part, by) if by else None

    def _refuse_words(self, output: Any) -> None:
        if any(words for _, words in words_in(output)):
            raise ValueError("a response that begins with words")

    def _shifted(self, raw: bytes, data: Body) -> bytes:
        return self._written(data) if self._shift else raw

    def _written(self, data: Body) -> bytes:
        moved = dict(data)
        if self._shift:
            moved["sequence_number"] = data["sequence_number"] + self._shift
            if "output_index" in data:
                moved["output_index"] = data["output_index"] + 1
        return event(moved, data["type"])
