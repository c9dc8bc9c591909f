"""Held-out conversations: how well each of their replies is predicted, given all that was really said before it.

Only rows with `messages` are conversations (see counsel.chat.conversation); an evaluation without any has none of this.
The statistics are over conversations, turn by turn. Turn 1 is the first reply that answers something.

turns.jsonl: the likelihood of one reply per line
| key | meaning |
|---|---|
| `arm`, `question_id`, `answer` | the conversation: `answer` is the number of its row among those of the question |
| `turn` | 1, 2, ...: the number of the reply |
| `nll_nats`, `tokens`, `bytes`, `attempts`, `error` | as in likelihood.jsonl (see eval/samples.py) |
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

from counsel.chat import Message, conversation
from counsel.run import Run
from eval.likelihood import bits_per_byte
from eval.questions import Question
from eval.samples import Key, Row
from eval.stats import Ratio, difference, holm, interval, ratio

TURN_KEY = ("arm", "question_id", "answer", "turn")
ALL_TURNS = "all"

# (question_id, answer) -> (bits, bytes)
_Cells = dict[tuple[str, int], tuple[float, float]]


class HeldOutReply(NamedTuple):
    """One reply of a held-out conversation, with the messages before it; see turns.jsonl for the other fields."""

    question_id: str
    answer: int
    turn: int
    history: list[Message]
    text: str

    def key(self, arm: str) -> Key:
        """The `TURN_KEY` of this reply's row."""
        return (arm, self.question_id, self.answer, self.turn)


def held_out_replies(run: Run, questions: Sequence[Question]) -> list[HeldOutReply]:
    """All replies of the conversations that open with one of these questions, in the order of the questions."""
    by_id: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in run.split("test"):
        by_id[row["question_id"]].append(row)
    return [
        HeldOutReply(question.question_id, number, turn, messages[:at], messages[at]["content"])
        for question in questions
        for number, row in enumerate(by_id[question.question_id])
        if row.get("messages")
        for messages in [conversation(row)]
        for turn, at in enumerate(_answered(messages), start=1)
    ]


def turn_findings(rows: Sequence[Row], arms: Sequence[str], base: str, seed: int) -> dict[str, Any]:
    """The `turns` of summary.json: bits per byte of every arm by turn, and its differences from the base.

    arms: arm -> turn -> the fields of eval.stats.Interval; the turn `all` is over all replies. differences: a list of
    {`arm`, `turn`, the fields of eval.stats.Difference, `p_holm`} over the replies that both have. n counts
    conversations. Holm's correction is over the turns of all arms, without `all`.
    """
    measured = [row for row in rows if row["nll_nats"] is not None]
    turns = [ALL_TURNS, *map(str, sorted({row["turn"] for row in measured}))]
    by_arm = {arm: {turn: cells for turn in turns if (cells := _cells(measured, arm, turn))} for arm in arms}
    values = {
        arm: {turn: interval(_ratio(cells), seed)._asdict() for turn, cells in by_turn.items()}
        for arm, by_turn in by_arm.items()
    }
    differences = []
    for arm in arms:
        if arm == base:
            continue
        shared = _shared(measured, (arm, base))
        for turn in turns:
            ours, theirs = _cells(shared, arm, turn), _cells(shared, base, turn)
            if ours:
                found = difference(_ratio(ours), _ratio(theirs), seed)
                found = found._replace(wins=found.losses, losses=found.wins)
                differences.append({"arm": arm, "turn": turn, **found._asdict(), "p_holm": None})
    tested = [row for row in differences if row["turn"] != ALL_TURNS]
    for row, p in zip(tested, holm([row["p"] for row in tested]), strict=True):
        row["p_holm"] = p
    return {
        "conversations": len({(row["question_id"], row["answer"]) for row in rows}),
        "arms": values,
        "differences": differences,
    }


def _answered(messages: Sequence[Message]) -> list[int]:
    """The positions of the replies; a greeting before the first user turn answers nothing."""
    roles = [message["role"] for message in messages]
    return [at for at in range(roles.index("user"), len(roles)) if roles[at] == "assistant"]


def _shared(measured: Sequence[Row], arms: Sequence[str]) -> list[Row]:
    """The arms' rows of the replies that all of them have: a long history may fit after one arm's prompt only."""
    by_arm = [{_reply_of(row) for row in measured if row["arm"] == arm} for arm in arms]
    common = set.intersection(*by_arm)
    return [row for row in measured if row["arm"] in arms and _reply_of(row) in common]


def _reply_of(row: Row) -> Key:
    """What a row measures: the conversation and the turn."""
    return tuple(row[name] for name in TURN_KEY[1:])


def _cells(rows: Sequence[Row], arm: str, turn: str) -> _Cells:
    """Bits and bytes of each conversation at this turn, in order."""
    cells: _Cells = {}
    for row in rows:
        if row["arm"] == arm and turn in (ALL_TURNS, str(row["turn"])):
            key = (row["question_id"], row["answer"])
            bits, n_bytes = cells.get(key, (0.0, 0.0))
            cells[key] = (bits + bits_per_byte(row["nll_nats"], row["bytes"]) * row["bytes"], n_bytes + row["bytes"])
    return dict(sorted(cells.items()))


def _ratio(cells: _Cells) -> Ratio:
    return ratio([bits for bits, _ in cells.values()], [n_bytes for _, n_bytes in cells.values()])
