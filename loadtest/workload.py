"""What is asked: prompts, lengths and turns, drawn once from a seed and saved as the plan of the run.

The plan is made before the run starts and holds every request. So a run can be read before it happens, repeated, and
compared with another one request by request, and no process decides, tokenizes or draws anything under load.

plan.jsonl has one arrival (a conversation of one or more turns) per line:
  id          0, 1, 2, ... in the order of due_s
  due_s       seconds after the start at which it is due; 0.0 in a closed loop, which has no schedule
  model       the model that it requests
  prompts     indices into prompts.jsonl, one per turn
  max_tokens  most tokens each reply may have
  think_s     pause between a reply and the next turn
  cancel_s    seconds after sending at which the client hangs up; null: it stays to the end
  tags        "long": a long prompt; "cold": sent to the adapter left alone longest; "hangs_up": it has a cancel_s
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from counsel.errors import UserError
from loadtest.distributions import parse
from loadtest.records import HANGS_UP

LENGTHS = {"": "N", "uniform": "uniform(LOW, HIGH)", "lognormal": "lognormal(MEDIAN, SIGMA)"}


class Arrival(NamedTuple):
    """One line of plan.jsonl."""

    id: int
    due_s: float
    model: str
    prompts: tuple[int, ...]
    max_tokens: int
    think_s: float
    cancel_s: float | None
    tags: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return self._asdict()

    @classmethod
    def from_json(cls, line: Mapping[str, Any]) -> "Arrival":
        return cls(**{**line, "prompts": tuple(line["prompts"]), "tags": tuple(line["tags"])})


def draw_lengths(option: str, text: str, n: int, random: np.random.Generator) -> "np.ndarray":
    """Draw `n` values of the distribution `text` (see LENGTHS), at least 0."""
    call = parse(option, text, LENGTHS)
    wanted = 1 if call.name == "" else 2
    if call.named or len(call.numbers) != wanted or min(call.numbers) < 0:
        raise UserError(f"{option} is {text!r}; the form is {LENGTHS[call.name]}, with numbers of 0 or more")
    if call.name == "":
        return np.full(n, call.numbers[0])
    first, second = call.numbers
    if call.name == "uniform":
        if first > second:
            raise UserError(f"{option} is {text!r}; LOW must not exceed HIGH")
        return random.uniform(first, second, n)
    return first * np.exp(second * random.standard_normal(n))


class Prompts:
    """The distinct user turns of a run, each stored once and referred to by its index."""

    def __init__(self, questions: Sequence[str], unique: bool, seed: int) -> None:
        self.texts: list[str] = []
        self._questions = list(questions)
        self._unique = unique
        self._known: dict[str, int] = {}
        self._random = np.random.default_rng([seed, 4])
        self._order: list[int] = []

    def draw(self, number: int, words: int | None) -> int:
        """Index of the next question; every question is used once before any is repeated.

        `words` makes it that long: questions are joined, then cut. If prompts must be unique, they start with `number`.
        """
        text = self._next()
        if words is not None:
            parts = text.split()
            while len(parts) < words:
                parts += self._next().split()
            text = " ".join(parts[: max(words, 1)])
        if self._unique:
            text = f"[{number}] {text}"
        if text not in self._known:
            self._known[text] = len(self.texts)
            self.texts.append(text)
        return self._known[text]

    def _next(self) -> str:
        if not self._order:
            self._order = self._random.permutation(len(self._questions)).tolist()
        return self._questions[self._order.pop()]


class Workload(NamedTuple):
    """The shape of the requests: see the options of the same names in loadtest.scenario."""

    output_tokens: str
    prompt_words: str
    turns: str
    think_s: str
    long_share: float
    long_words: int
    cancel_share: float
    cancel_after_s: str


def make_plan(
    due_s: Sequence[float], models: Sequence[tuple[str, bool]], prompts: Prompts, workload: Workload, seed: int
) -> list[Arrival]:
    """Give each due time its model, prompts and lengths, and whether the client will hang up."""
    n = len(due_s)
    random = np.random.default_rng([seed, 5])
    max_tokens = np.maximum(draw_lengths("output_tokens", workload.output_tokens, n, random).round(), 1)
    turns = np.maximum(draw_lengths("turns", workload.turns, n, random).round(), 1)
    think_s = draw_lengths("think_s", workload.think_s, n, random)
    words = draw_lengths("prompt_words", workload.prompt_words, n, random).round() if workload.prompt_words else None
    is_long = random.random(n) < workload.long_share
    hangs_up = random.random(n) < workload.cancel_share
    cancel_s = draw_lengths("cancel_after_s", workload.cancel_after_s, n, random)
    plan, number = [], 0
    for i in range(n):
        model, is_cold = models[i]
        wanted = workload.long_words if is_long[i] else int(words[i]) if words is not None else None
        drawn = []
        for turn in range(int(turns[i])):
            drawn.append(prompts.draw(number, wanted if turn == 0 else None))
            number += 1
        known = (("long", is_long[i]), ("cold", is_cold), (HANGS_UP, hangs_up[i]))
        tags = [tag for tag, present in known if present]
        plan.append(
            Arrival(
                id=i,
                due_s=round(float(due_s[i]), 6),
                model=model,
                prompts=tuple(drawn),
                max_tokens=int(max_tokens[i]),
                think_s=round(float(think_s[i]), 3),
                cancel_s=round(float(cancel_s[i]), 3) if hangs_up[i] else None,
                tags=tuple(tags),
            )
        )
    return plan
