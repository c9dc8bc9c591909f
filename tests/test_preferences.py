"""Preference pairs in their forms, what is dropped and why, and the split by question."""

import json

import pytest

from counsel.errors import UserError
from counsel.files import write_jsonl
from tests.preference_pairs import planted
from train.cleaning import question_id
from train.preferences.pairs import Preference, one_per_question, read_preferences, split

ASK, GOOD, BAD = "How do I sleep?", "Keep one hour for going to bed.", "Just sleep."


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def says(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


PAIR = Preference(question_id(ASK), [user(ASK)], GOOD, BAD)
FORMS = {
    "trl strings": {"prompt": ASK, "chosen": GOOD, "rejected": BAD},
    "trl messages": {"prompt": [user(ASK)], "chosen": [says(GOOD)], "rejected": [says(BAD)]},
    "trl prompt as messages, answers as strings": {"prompt": [user(ASK)], "chosen": GOOD, "rejected": BAD},
    "trl without a prompt": {"chosen": [user(ASK), says(GOOD)], "rejected": [user(ASK), says(BAD)]},
    "a prompt repeated in the answers": {
        "prompt": ASK, "chosen": [user(ASK), says(GOOD)], "rejected": [user(ASK), says(BAD)], "score_chosen": 8.0,
    },
    "openai": {
        "input": {"messages": [user(ASK)], "tools": [], "parallel_tool_calls": True},
        "preferred_output": [says(GOOD)], "non_preferred_output": [says(BAD)],
    },
    "openai with content parts": {
        "input": {"messages": [{"role": "user", "content": [{"type": "text", "text": ASK}]}]},
        "preferred_output": [says(GOOD)], "non_preferred_output": [says(BAD)],
    },
    "ultrafeedback": {
        "instruction": ASK, "source": "x", "completions": [
            {"response": "Some.", "overall_score": 5.0}, {"response": GOOD, "overall_score": 8.5},
            {"response": BAD, "overall_score": 2.0}, {"response": "Unrated.", "overall_score": None},
        ],
    },
    "a vote": {
        "id": "0" * 32, "models": ["a@1", "b@1"], "choice": "second", "blind": True, "consent": True, "comment": "",
        "prompt": [user(ASK)], "chosen": [says(GOOD)], "rejected": [says(BAD)],
    },
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_each_form_gives_the_same_pair(form, tmp_path):
    write_jsonl(tmp_path / "pairs.jsonl", [FORMS[form], FORMS[form]])

    pairs, report = read_preferences(str(tmp_path / "pairs.jsonl"))

    assert pairs == [PAIR]
    assert (report.rows_in, report.pairs, report.dropped) == (2, 1, {"duplicate": 1})


def test_a_conversation_keeps_its_history_and_its_system_turn(tmp_path):
    """Where whole conversations differ only in the last answer, what they share is the prompt."""
    history = [{"role": "system", "content": "Be kind."}, user(ASK), says("Tell me more."), user("I lie awake.")]
    row = {"chosen": [*history, says(GOOD)], "rejected": [*history, says(BAD)]}
    write_jsonl(tmp_path / "pairs.jsonl", [row, row])

    (pair,), _ = read_preferences(str(tmp_path / "pairs.jsonl"))

    assert pair == Preference(question_id(ASK), history, GOOD, BAD)
    assert pair.with_system("Be brief.") == pair
    assert PAIR.with_system("Be brief.").prompt == [{"role": "system", "content": "Be brief."}, user(ASK)]
    assert PAIR.with_system("") == PAIR


def test_what_trains_nothing_is_dropped_and_counted(tmp_path):
    good = FORMS["trl strings"]
    rows = [
        good,
        good,
        good | {"rejected": GOOD},
        good | {"rejected": "  "},
        good | {"prompt": ""},
        good | {"prompt": [user(ASK), says(BAD)]},
        good | {"prompt": [{"role": "tool", "content": ASK}]},
        good | {"chosen": [says(GOOD), user("And?"), says(GOOD)]},
        {"chosen": GOOD, "rejected": BAD},
        {"prompt": ASK, "chosen": GOOD},
        {"prompt": [user(ASK)], "completion": [says(GOOD)], "label": True, "consent": True},
        {"consent": False, "choice": "first", "models": ["a@1", "b@1"]},
        {"instruction": ASK, "completions": [{"response": GOOD, "overall_score": 5}] * 2},
        {"instruction": ASK, "completions": [{"response": GOOD, "overall_score": 5}]},
    ]
    write_jsonl(tmp_path / "pairs.jsonl", rows)

    pairs, report = read_preferences(str(tmp_path / "pairs.jsonl"))

    assert pairs == [PAIR]
    assert report.dropped == {
        "duplicate": 1,
        "both answers are the same": 1,
        "an answer is empty": 1,
        "a turn of the prompt is empty": 1,
        "the prompt's turns do not alternate and end with the person's": 1,
        "a turn is not of role system, user or assistant": 1,
        "an answer is not one assistant turn": 1,
        "no prompt": 1,
        "no chosen and rejected answer": 1,
        "a verdict on one answer, which is no pair": 1,
        "a vote without text (no consent, or a tie)": 1,
        "all answers have the same score": 1,
        "fewer than two rated answers": 1,
    }
    assert sum(report.dropped.values()) + report.pairs == report.rows_in == len(rows)


def test_contacts_are_masked(tmp_path):
    write_jsonl(
        tmp_path / "pairs.jsonl", [{"prompt": ASK, "chosen": f"{GOOD} Write to ann@example.org", "rejected": BAD}]
    )

    (pair,), report = read_preferences(str(tmp_path / "pairs.jsonl"))

    assert pair.chosen == f"{GOOD} Write to [e-mail address]"
    assert report.masked == 1


def test_a_file_of_something_else_says_why(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([{"question": ASK, "answer": GOOD}]))

    with pytest.raises(
        UserError, match=r"no row of .*rows.json' is a preference pair; dropped: 1 no chosen and rejected"
    ):
        read_preferences(str(path))


@pytest.mark.parametrize("n", [2, 3, 40])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_no_question_is_on_both_sides(n, seed, tmp_path):
    """In any order of rows, also for a second pair and a later turn of the same conversation."""
    rows = planted(n, "shorter")
    rows += [row | {"chosen": f"{row['chosen']} again"} for row in rows]
    rows += [row | {"prompt": [user(row["prompt"].upper()), says("Yes."), user("And now?")]} for row in rows[:n]]
    write_jsonl(tmp_path / "pairs.jsonl", rows)
    pairs, _ = read_preferences(str(tmp_path / "pairs.jsonl"))
    banned = {pairs[0].question_id}

    train, held_out = split(pairs, 0.01, seed, banned)
    backward, _ = split(pairs[::-1], 0.01, seed, banned)

    assert len(train) + len(held_out) == 3 * n
    assert not {pair.question_id for pair in train} & {pair.question_id for pair in held_out}
    assert pairs[0] in held_out
    assert train == backward[::-1]
    first = one_per_question(pairs)
    assert first == pairs[:n]
    with pytest.raises(UserError, match="the training side is empty"):
        split(pairs, 0.01, seed, {pair.question_id for pair in pairs})
