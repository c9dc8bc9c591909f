"""The crisis gate's decision about one request, while the model is asked (serve/safety/held.py).

The user's last turns go to the detector, in a thread of its own, and to the guard model, if the policy names one. A
risk puts a reviewed text before the model's own answer, once per conversation, and the model answers under a safe
system prompt. Where a checker is dead, slow or raises, the person gets the reviewed text alone, and an alarm is
counted.
"""

import asyncio
import fnmatch
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Protocol

from counsel.safety.detector import Assessment, Detector
from counsel.safety.labels import ACTIVE, LABELS, NONE
from counsel.safety.policy import Policy
from serve.api_errors import ApiError
from serve.chat_turns import SYSTEM_ROLES, text_of
from serve.content_parts import items_of, messages_of
from serve.reply import Send
from serve.request_rewrite import CHAT, COMPLETIONS, RESPONSES, Body
from serve.safety.counts import SafetyCounts
from serve.safety.disclosure import ASKED, Disclosures
from serve.safety.guard import Guard
from serve.safety.reply import HEADER, CheckedReply, Headers
from serve.safety.rules import RULES
from serve.safety.shapes import head_of, is_structured, number_of_choices
from serve.safety.stream import Verdict
from serve.safety.webhook import Webhook

log = logging.getLogger("vllm.counsel")

COUNTRY_HEADER = b"x-counsel-country"
DISCLOSURE_HEADER = b"x-counsel-disclosure"
# Actions. CONTINUED: a risk whose text the conversation has already. UNCHECKED: a checker failed.
CRISIS, CONTINUED, UNCHECKED, REPLACED, DISCLOSED = "crisis", "crisis-continued", "unchecked", "replaced", "disclosed"
_NOT_USERS = (*SYSTEM_ROLES, "assistant", "tool", "function")


class _CheckerError(Exception):
    """A checker failed, and that was counted."""


class Checker(Protocol):
    """What the gate needs of a detector."""

    card: dict[str, Any]

    def assess(self, user_turns: Sequence[str]) -> Assessment: ...


@dataclass(frozen=True)
class Conversation:
    """What a request says: the turns of the user, and those of the assistant.

    separate: the user's texts are prompts of their own, not turns of one conversation.
    """

    user: tuple[str, ...]
    assistant: tuple[str, ...]
    separate: bool = False

    def parts(self, window: int) -> list[tuple[str, ...]]:
        """What is judged: the last `window` turns, or each prompt."""
        if self.separate:
            return [(prompt,) for prompt in self.user]
        return [self.user[-window:]] if self.user else []


@dataclass(frozen=True)
class Decision:
    """What the gate does with one request.

    action: "none" or one of the actions above. prefix: the text before the answer. guidance: what is added to the
    system prompt. alone: `prefix` is the whole reply. disclosure: why it is due, or "".
    """

    action: str = NONE
    label: str = NONE
    prefix: str = ""
    guidance: str = ""
    alone: bool = False
    disclosure: str = ""
    country: str = ""

    def field(self) -> Body:
        """The reply's field `counsel_safety`."""
        return {
            "action": self.action,
            "label": self.label,
            **({"disclosure": self.disclosure} if self.disclosure else {}),
        }

    def headers(self) -> Headers:
        value = self.action if self.label == NONE else f"{self.action}; label={self.label}"
        disclosed = [(DISCLOSURE_HEADER, self.disclosure.encode())] if self.disclosure else []
        return [(HEADER, value.encode()), *disclosed]


class SafetyGate:
    """Decides, and makes the output check of a reply. Lives on one event loop."""

    def __init__(
        self, policy: Policy, detector: Checker, counts: SafetyCounts, decode: Callable[[list[int]], str]
    ) -> None:
        """`decode`: the text of a prompt that is given as token ids. Raises UserError for a policy without its key."""
        self.policy, self.detector, self.counts, self._decode = policy, detector, counts, decode
        self.texts = policy.read_texts()
        self.disclosures = Disclosures(policy.disclosure_every_h)
        self._guard = Guard(policy) if policy.guard_url else None
        self._webhook = Webhook(policy, lambda reason: counts.alarm("webhook", reason))
        self._thread = ThreadPoolExecutor(1, "safety")

    def covers(self, model: str) -> bool:
        """Whether the policy covers a model, by its served name."""
        return any(fnmatch.fnmatchcase(model, pattern) for pattern in self.policy.models)

    async def decide(self, path: str, body: Body, *, key: str, country: str) -> Decision:
        """The decision about a request. Raises ApiError for one that the gate refuses."""
        _refuse_unreadable(path, body)
        conversation = read_conversation(path, body, self._decode)
        country = country or self.policy.country
        try:
            decision = await self._decided(conversation, key, country)
        except Exception as error:  # whatever it is, the message was not checked
            if not isinstance(error, _CheckerError):
                self._alarm("gate", error)
            text = self.texts.render(UNCHECKED, country)
            decision = Decision(UNCHECKED, NONE, text, alone=True, country=country)
        if decision.action != NONE:
            self.counts.action(decision.action, decision.label)
        if decision.disclosure:
            self.counts.action(DISCLOSED, decision.disclosure)
        if decision.prefix and is_structured(body):
            if decision.action in (CRISIS, UNCHECKED):
                raise _refusal(decision)
            # A disclosure alone: the header has it.
            decision = replace(decision, prefix="")
        return decision

    def reply(self, send: Send, path: str, body: Body, decision: Decision, request_id: str, model: str) -> CheckedReply:
        """The output check of the reply to a request."""
        texts = {name: self.texts.render(name, decision.country) for name in {rule.name for rule in RULES}}
        verdict = Verdict(decision.field(), texts, structured=is_structured(body))
        verdict.on_replaced = lambda name: self.counts.action(REPLACED, name)
        prefix = decision.prefix
        return CheckedReply(
            send,
            path=path,
            head=head_of(path, request_id, model),
            n=number_of_choices(path, body),
            prefix="" if decision.alone else prefix,
            fallback=prefix if decision.alone else self.texts.render(UNCHECKED, decision.country),
            headers=decision.headers(),
            verdict=verdict,
            on_fault=lambda reason: self.counts.alarm("output", reason),
        )

    async def _decided(self, conversation: Conversation, key: str, country: str) -> Decision:
        label = await self._label(conversation.parts(self.policy.window))
        shown = self.texts.shown_before(conversation.assistant)
        name = self.disclosures.conversation(key, conversation.user[0] if conversation.user else "")
        newest = conversation.user[-1] if conversation.user else ""
        disclosure = self.disclosures.due(name, newest, is_first=not conversation.assistant)
        parts = []
        # Again only where the risk has become more urgent than what was shown.
        if label != NONE and all(LABELS.index(label) < LABELS.index(before) for before in shown):
            parts.append(self.texts.render(label, country))
            action = CRISIS
        else:
            action = CONTINUED if shown or label != NONE else NONE
        wanted = self.policy.disclosure_in_answer
        if disclosure and (wanted == "always" or (wanted == "asked" and disclosure == ASKED)):
            parts.append(self.texts.render("disclosure", country))
        if label != NONE:
            self._webhook.notify(label, name)
        return Decision(
            action,
            label,
            "".join(f"{part}\n\n" for part in parts),
            self.texts.templates["guidance"] if action != NONE else "",
            disclosure=disclosure,
            country=country,
        )

    async def _label(self, parts: Sequence[tuple[str, ...]]) -> str:
        """The most urgent risk that a checker finds, or NONE. Raises _CheckerError if one fails, having counted it."""
        checks = {"detector": self._detected} | ({"guard": self._guarded} if self._guard is not None else {})
        names = [name for _ in parts for name in checks]
        asked = [check(part) for part in parts for check in checks.values()]
        found = await asyncio.gather(*asked, return_exceptions=True)
        failed = [
            (name, result) for name, result in zip(names, found, strict=True) if isinstance(result, BaseException)
        ]
        for name, error in failed:
            self._alarm(name, error)
        if failed:
            raise _CheckerError
        return min([NONE, *map(str, found)], key=LABELS.index)

    def _alarm(self, checker: str, error: BaseException) -> None:
        # Not the error's message: it may quote the request.
        log.error("the crisis gate could not check a request: %s: %s", checker, type(error).__name__)
        self.counts.alarm(checker, "timeout" if isinstance(error, TimeoutError) else "error")

    async def _detected(self, turns: Sequence[str]) -> str:
        async with asyncio.timeout(self.policy.detector_s):
            assessment = await asyncio.get_running_loop().run_in_executor(self._thread, self.detector.assess, turns)
        if assessment.label not in LABELS:
            raise ValueError("the detector's label is not a known one")
        return assessment.label

    async def _guarded(self, turns: Sequence[str]) -> str:
        assert self._guard is not None
        async with asyncio.timeout(self.policy.guard_s):
            # A guard does not tell the classes apart as the detector does.
            return ACTIVE if await self._guard.finds_risk(turns) else NONE


def load_detector(policy: Policy) -> Detector:
    """The shipped detector with the policy's thresholds.

    Raises UserError where it cannot be read, or a measured figure is below its bound.
    """
    detector = Detector.load(thresholds=policy.thresholds)
    detector.check()
    return detector


def country_in(headers: dict[bytes, bytes]) -> str:
    """The caller's country from its header; "" where there is none, or not two letters."""
    country = headers.get(COUNTRY_HEADER, b"").decode("latin-1").strip().upper()
    return country if len(country) == 2 and country.isascii() and country.isalpha() else ""


def read_conversation(path: str, body: Body, decode: Callable[[list[int]], str]) -> Conversation:
    """The turns of a request. Raises ApiError 400 for what is not text.

    A turn with a role that is unknown counts as the user's. A completion's prompt is read as what a user wrote.
    """
    if path == COMPLETIONS:
        return Conversation(tuple(_prompts(body.get("prompt"), decode)), (), separate=True)
    if path == CHAT:
        turns = messages_of(body.get("messages"))
    else:
        given = items_of(body.get("input"))
        turns = [{"role": "user", "content": given}] if isinstance(given, str) else given
        turns = [turn for turn in turns if turn.get("type", "message") == "message"]
    return Conversation(
        tuple(text_of(turn) for turn in turns if turn.get("role") not in _NOT_USERS),
        tuple(text_of(turn) for turn in turns if turn.get("role") == "assistant"),
    )


def _prompts(prompt: Any, decode: Callable[[list[int]], str]) -> list[str]:
    if isinstance(prompt, str):
        return [prompt]
    if not isinstance(prompt, list):
        raise ApiError(400, "prompt must be a string, a list of token ids, or a list of either", param="prompt")
    if prompt and all(isinstance(part, int) for part in prompt):
        try:
            return [decode(prompt)]
        except (OverflowError, TypeError, IndexError) as error:
            raise ApiError(400, "prompt has a token id that the model does not know", param="prompt") from error
    return [text for part in prompt for text in _prompts(part, decode)]


def _refuse_unreadable(path: str, body: Body) -> None:
    """Raise ApiError 400 for what the gate cannot read or would have to pass unchecked."""
    if path == COMPLETIONS and body.get("echo"):
        raise ApiError(400, "echo is true; the crisis gate checks answers, so leave echo out", param="echo")
    for name in ("prompt_embeds", "previous_response_id", "documents"):
        if body.get(name) is not None:
            raise ApiError(400, f"{name} is given; the crisis gate cannot read it, so send text", param=name)
    if path == RESPONSES and body.get("prompt") is not None:
        raise ApiError(400, "prompt is given; the crisis gate cannot read it, so send input", param="prompt")


def _refusal(decision: Decision) -> ApiError:
    """For an answer of a required form, which a text would break: the error is where the text goes."""
    text = " ".join(decision.prefix.split())
    code = "crisis_gate"
    if decision.alone:
        return ApiError(503, text, code=code, retry_after_s=1)
    return ApiError(400, f"{text} (ask without response_format)", param="response_format", code=code)


def figures(card: dict[str, Any]) -> dict[str, Any]:
    """A detector's measured figures, as they are shown at the start and in `/version`."""
    return {name: card[name] for name in ("n", "recall", "false_positives") if name in card}
