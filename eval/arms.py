"""Arms: a model with a way of prompting it. `gentle` and `smollm2-135m/few-shot` are arms.

An arm's name is the served name, plus `/native` or `/few-shot` if the prompt is not the one that adapters are trained
with. A baseline is the base model under such a prompt.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from counsel.chat import Message, prompt_messages, with_system
from counsel.client import ServerModels
from counsel.errors import UserError

# Arms that are not models; their scores give the floor and ceiling of a metric (see eval/scoring.py).
YARDSTICKS = ("human", "retrieval", "shuffled", "echo", "canned")
# The user's name for the base model, whatever the server calls it.
BASE = "base"
TUNED, NATIVE, FEW_SHOT = "tuned", "native", "few-shot"
EXAMPLES = 2
# Examples must leave room for the question; training answers can have a thousand words.
_EXAMPLE_CHARS = 900


class Arm(NamedTuple):
    """A served model and its prompt: tuned (the system prompt of training), native (none) or few-shot."""

    model: str
    prompt: str = TUNED

    @property
    def name(self) -> str:
        return self.model if self.prompt == TUNED else f"{self.model}/{self.prompt}"


def choose(server_models: ServerModels, run: str, models: Sequence[str], baselines: bool) -> list[Arm]:
    """The arms to ask, in the order of `models`; the base is followed by its baselines.

    The default is the base and the adapter with the run's name. Raises UserError for a model that is not served, or
    whose name is that of another arm.
    """
    offered = ", ".join([BASE, *server_models.adapters])
    if not models and run not in server_models.adapters:
        raise UserError(
            f"the server does not serve {run!r}, this run's adapter; publish it, or choose with --models {offered}"
        )
    base = server_models.base
    # `roots` has exact versions (`name@version`) too.
    by_name = {name: name for name in server_models.roots} | {BASE: base}
    for model in models or (run,):
        if model not in by_name:
            raise UserError(f"the server has no model {model!r}; it has {offered}")
    wanted = [by_name[model] for model in models] or [server_models.base, run]
    arms = [Arm(model) for model in dict.fromkeys(wanted)]
    if baselines and server_models.base in wanted:
        at = arms.index(Arm(server_models.base)) + 1
        arms[at:at] = [Arm(server_models.base, NATIVE), Arm(server_models.base, FEW_SHOT)]
    names = [arm.name for arm in arms]
    for arm in arms:
        if arm.name in YARDSTICKS or names.count(arm.name) > 1:
            raise UserError(f"the model {arm.name!r} has the name of another arm; serve it under another name")
    return arms


def messages(arm: Arm, question: str, system: str, examples: Sequence[dict[str, Any]]) -> list[Message]:
    """The messages that ask `arm` the question.

    `system` is the run's system prompt, which native arms do not get; `examples` are training rows for few-shot arms.
    """
    return history(arm, prompt_messages(question, system=""), system, examples)


def history(
    arm: Arm, conversation: Sequence[Message], system: str, examples: Sequence[dict[str, Any]]
) -> list[Message]:
    """The messages of a conversation as `arm` gets them: see `messages`. A system message of its own always stays."""
    turns = with_system(conversation, "" if arm.prompt == NATIVE else system)
    if arm.prompt != FEW_SHOT:
        return turns
    n_system = int(turns[0]["role"] == "system")
    example_turns = [
        turn
        for row in examples
        for turn in ({"role": "user", "content": row["question"]}, {"role": "assistant", "content": row["answer"]})
    ]
    return [*turns[:n_system], *example_turns, *turns[n_system:]]


def few_shot_examples(train_rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Two short training rows on different topics, chosen by the hash of their questions."""
    short = [row for row in train_rows if len(row["question"]) + len(row["answer"]) <= _EXAMPLE_CHARS]
    chosen: list[dict[str, Any]] = []
    for row in sorted(short, key=lambda row: (row["question_id"], row["answer"])):
        if row["question_id"] not in {c["question_id"] for c in chosen} and (
            not row["topic"] or row["topic"] not in {c["topic"] for c in chosen}
        ):
            chosen.append(row)
        if len(chosen) == EXAMPLES:
            break
    return chosen
