"""Conversations of several turns: shapes are recognized, turns repaired and counted, and shared turns kept together."""

import dataclasses
import gzip
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from counsel.chat import conversation
from counsel.errors import UserError
from train import delimited, documents, spool
from train.cleaning import clean
from train.data import SPLITS, DataConfig, load_rows, prepare
from train.decoding import Text
from train.meter import Meter
from train.overlap import grouped, shared_turns
from train.shapes import recognized
from train.sources import load, load_each
from train.spool import Selection, Spool
from train.turns import ASSISTANT, SYSTEM, TOOL, USER, Turn, repaired

ANSWER = "Take one small step today and rest."
LONG = "My manager keeps sending messages late at night and I feel that I have to answer every one of them right away"
U, A, S, T = "user", "assistant", "system", "tool"


def saved(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def turns(*contents: str) -> list[dict[str, str]]:
    """Messages of these contents, by user and assistant in turn."""
    return [{"role": (U, A)[n % 2], "content": text} for n, text in enumerate(contents)]


def read(path: Path, rows: list[dict]) -> list[list[tuple[str, str]]]:
    """The conversations of a file of these rows, as pairs of role and text."""
    cleaned = load_rows(DataConfig(data=saved(path, rows))).cleaned
    return [[(message["role"], message["content"]) for message in conversation(row)] for row in cleaned.rows]


TWO = [(U, "Why now?"), (A, ANSWER), (U, "And then?"), (A, "Then walk.")]


@pytest.mark.parametrize(
    ("row", "expected", "described"),
    [
        ({"messages": [{"role": r, "content": c} for r, c in TWO]}, TWO, "'messages', turns of 'role' and 'content'"),
        ({"messages": [{"role": r, "content": [{"type": "text", "text": c}]} for r, c in TWO]}, TWO, "'messages'"),
        ({"messages": json.dumps([{"role": r, "content": c} for r, c in TWO])}, TWO, "'messages'"),
        ({"messages": str([{"role": r, "content": c} for r, c in TWO])}, TWO, "'messages'"),
        (
            {"id": 1, "conversations": [{"from": {U: "human", A: "gpt"}[r], "value": c} for r, c in TWO]},
            TWO,
            "'conversations', turns of 'from' and 'value'",
        ),
        (
            {"dialog": [{"speaker": {U: "seeker", A: "supporter"}[r], "content": c} for r, c in TWO]},
            TWO,
            "'dialog', turns of 'speaker' and 'content'",
        ),
        ({"my talk": [{"role": r, "text": c} for r, c in TWO]}, TWO, "'my talk', turns of 'role' and 'text'"),
        (
            {"system": "Be kind.", "conversations": [{"from": "human", "value": "Why?"},
                                                     {"from": "gpt", "value": ANSWER}]},
            [(S, "Be kind."), (U, "Why?"), (A, ANSWER)],
            "'conversations'",
        ),
        ({"instruction": "Why?", "input": "", "output": ANSWER}, [(U, "Why?"), (A, ANSWER)], "Alpaca"),
        ({"instruction": "Go on.", "input": "Why?", "output": ANSWER}, [(U, "Go on.\n\nWhy?"), (A, ANSWER)], "Alpaca"),
        ({"Prompt": "Why?", "completion ": ANSWER}, [(U, "Why?"), (A, ANSWER)], "'Prompt' as the question"),
        (
            {"prompt": turns("Why?"), "completion": [{"role": A, "content": ANSWER}]},
            [(U, "Why?"), (A, ANSWER)],
            "'prompt'",
        ),
        ({"question": "Why?", "answer": ANSWER}, [(U, "Why?"), (A, ANSWER)], "'question' as the question"),
    ],
)  # fmt: skip
def test_a_shape_is_recognized_and_said(tmp_path, row, expected, described):
    """The shapes people have give one kind of row, and the report says in one line what was recognized."""
    assert read(tmp_path / "t.jsonl", [row]) == [expected]
    assert described in load_rows(DataConfig(data=str(tmp_path / "t.jsonl"))).read_as


def test_an_instruction_that_all_rows_repeat_is_the_system_message(tmp_path):
    """Alpaca sets often hold one instruction and the person's text as input; two instructions are part of questions."""
    rows = [{"instruction": "Be warm.", "input": f"I am sad {n}", "output": f"{ANSWER} {n}"} for n in range(2)]

    assert read(tmp_path / "t.jsonl", rows)[1] == [(S, "Be warm."), (U, "I am sad 1"), (A, f"{ANSWER} 1")]
    rows[0]["instruction"] = "Be brief."
    assert read(tmp_path / "t.jsonl", rows)[1] == [(U, "Be warm.\n\nI am sad 1"), (A, f"{ANSWER} 1")]


def test_intents_pair_each_pattern_with_a_response(tmp_path):
    """Every pattern and every response is used, in turn; the tag is the topic."""
    intent = {"tag": "sad", "patterns": ["I am low", "so sad", "bad day"], "responses": [ANSWER, f"{ANSWER} Truly."]}
    (tmp_path / "t.json").write_text(json.dumps({"intents": [intent]}), encoding="utf-8")

    cleaned = load_rows(DataConfig(data=str(tmp_path / "t.json"))).cleaned

    assert [(row["question"], row["answer"]) for row in cleaned.rows] == list(
        zip(intent["patterns"][:2], intent["responses"], strict=True)
    )
    assert cleaned.dropped == {"answer given to another question": 1}
    assert {row["topic"] for row in cleaned.rows} == {"sad"}


def test_the_rows_of_a_run_are_read_again(tmp_path):
    """Some have messages, the others a question and an answer only."""
    rows = [{"messages": turns("Why?", ANSWER)}, {"messages": turns("Who?", ANSWER + " Now.", "So?", "So.")}]
    written = list(load_rows(DataConfig(data=saved(tmp_path / "t.jsonl", rows))).cleaned.rows)

    again = load_rows(DataConfig(data=saved(tmp_path / "again.jsonl", written)))

    assert again.cleaned.rows == written


def test_named_columns_win_over_shapes(tmp_path):
    """Columns that are named, or have the default names, are used whatever else the file has."""
    row = {"context": "Why?", "Response": ANSWER, "q": "Who?", "messages": turns("x", ANSWER), "answer": ANSWER}

    assert read(tmp_path / "t.jsonl", [row]) == [[(U, "Why?"), (A, ANSWER)]]
    named = load_rows(DataConfig(data=str(tmp_path / "t.jsonl"), question_column="q", answer_column="answer"))
    assert named.cleaned.rows[0]["question"] == "Who?"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([{"role": "moderator", "content": "x"}], "row 2, turn 1: role is 'moderator'; it must be system, user"),
        ([{"role": U, "content": 5}], "row 2, turn 1: content is int '5'; it must be text"),
        ([{"role": U, "content": [{"type": "image_url"}]}], "row 2, turn 1: content has a part that is not text"),
        ([{"role": U}], "row 2: messages is \"[{'role': 'user'}]\"; it must be a list of turns"),
        ("hello", "row 2: messages is 'hello'; it must be a list of turns"),
    ],
)
def test_a_turn_that_cannot_be_read_is_a_one_line_error(tmp_path, value, message):
    """The error names row, turn and value."""
    with pytest.raises(UserError) as raised:
        read(tmp_path / "t.jsonl", [{"messages": turns("Why?", ANSWER)}, {"messages": value}])
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("given_turns", "expected", "changes"),
    [
        ([(U, "a"), (U, "b"), (A, "c"), (A, "d")], [(U, "a\n\nb"), (A, "c\n\nd")], {"merged": 2}),
        ([(A, "hi"), (U, "a"), (A, "c")], [(U, "a"), (A, "c")], {"before the first": 1}),
        ([(U, "a"), (A, "c"), (U, "bye"), (U, "now")], [(U, "a"), (A, "c")], {"merged": 1, "from the end": 1}),
        ([(U, "a"), (A, "  "), (U, "b"), (A, "c")], [(U, "a\n\nb"), (A, "c")], {"empty": 1, "merged": 1}),
        ([(S, "x"), (S, "y"), (U, "a"), (A, "c")], [(S, "x\n\ny"), (U, "a"), (A, "c")], {}),
        ([(U, "a"), (S, "x"), (A, "c")], [(U, "a"), (A, "c")], {"system message after": 1}),
        ([(U, "a"), (A, ""), (T, "{}"), (A, "c")], [(U, "a"), (A, "c")], {"tool": 1, "empty": 1}),
        ([(U, "a")], [(U, "a")], {}),
        ([(A, "a")], [], {"before the first": 1}),
        ([], [], {}),
    ],
)
def test_turns_are_repaired_by_stated_rules(given_turns, expected, changes):
    """Each change is counted under its kind."""
    messages, counted = repaired(Turn(*turn) for turn in given_turns)

    assert [(message["role"], message["content"]) for message in messages] == expected
    assert len(counted) == len(changes)
    assert all([n for kind, n in counted.items() if part in kind] == [count] for part, count in changes.items())


ROLES = (SYSTEM, USER, ASSISTANT, TOOL)


@pytest.mark.parametrize("roles", [roles for n in range(5) for roles in itertools.product(ROLES, repeat=n)])
def test_every_order_of_turns_gives_a_conversation_or_nothing(roles):
    """One system message at most, first; then user and assistant in turn. Nothing else is lost but at the ends."""
    messages, changes = repaired(Turn(role, f"t{n}") for n, role in enumerate(roles))
    said = [message["role"] for message in messages if message["role"] != SYSTEM]

    assert [message["role"] for message in messages[1:]].count(SYSTEM) == 0
    assert said == [(USER, ASSISTANT)[n % 2] for n in range(len(said))]
    assert len(said) % 2 == 0 or said == [USER]
    n_kept = sum(len(message["content"].split()) for message in messages)
    n_lost = sum(n for kind, n in changes.items() if "dropped" in kind or "before the first" in kind)
    n_cut = changes["user turn without a reply cut from the end"]
    assert n_kept + n_lost == len(roles) or (n_cut and n_kept + n_lost < len(roles))


def test_a_bad_turn_drops_its_conversation(tmp_path):
    """A contact in any turn does; `mask` keeps it. One short reply does not, if another is long enough."""
    rows = [
        {"messages": turns("Why so?", ANSWER, "Mail a.b@example.org", "I will do so.")},
        {"messages": turns("Who are you?", ANSWER, "Thanks", "Any time.")},
        {"messages": turns("Where to?", "Home.", "Thanks", "Any time.")},
        {"messages": turns("And where?")},
        {"messages": []},
    ]
    data = saved(tmp_path / "t.jsonl", rows)

    dropped, masked = load_rows(DataConfig(data=data)), load_rows(DataConfig(data=data, contacts="mask"))

    assert [row["question"] for row in dropped.cleaned.rows] == ["Who are you?"]
    assert dropped.cleaned.dropped == {
        "e-mail address": 1, "answer under 6 words": 1, "empty answer": 1, "empty question": 1,
    }  # fmt: skip
    assert "row 1: 'Mail a.b@example.org'" in dropped.cleaned.examples["e-mail address"]
    assert masked.cleaned.rows[0]["messages"][2]["content"] == "Mail [e-mail address]"
    assert masked.cleaned.masked == {"e-mail address": 1}


def test_a_row_has_messages_only_if_it_needs_them(tmp_path):
    """One question and one answer stay as they were; conversations add the whole, and copies are dropped."""
    rows = [
        {"messages": turns("Why?", ANSWER)},
        {"messages": turns("Who?", ANSWER + " Now.", "So?", "So.")},
        {"messages": turns("who", ANSWER + " now", "so!", "So.")},
    ]
    cleaned = load_rows(DataConfig(data=saved(tmp_path / "t.jsonl", rows))).cleaned

    assert [list(row) for row in cleaned.rows] == [
        ["question_id", "question", "answer", "topic"],
        ["question_id", "question", "answer", "topic", "messages"],
    ]
    assert cleaned.dropped == {"duplicate but for spaces, case, punctuation": 1}
    assert conversation(cleaned.rows[0]) == turns("Why?", ANSWER)
    assert conversation(cleaned.rows[1]) == turns("Who?", ANSWER + " Now.", "So?", "So.")


def talks(n: int) -> list[dict]:
    """`n` conversations that share short turns only."""
    words = ["amber", "birch", "cedar", "dune", "ember", "frost", "grove", "heath", "island", "juniper"]

    def long(at: int, turn: int) -> str:
        return " ".join(words[(at * 7 + turn * 3 + k * (at % 9 + 1)) % 10] + str(at * 5 + turn + k) for k in range(9))

    return [
        {"messages": turns("hi", f"Hello, how are you today, friend {at}?", long(at, 0), ANSWER, "thanks", "Any time.")}
        for at in range(n)
    ]


def test_shared_turns_and_near_copies_stay_on_one_side(tmp_path):
    """Planted in 200 conversations: two pairs share a long turn, two have near copies; short turns tie nothing."""
    rows = talks(200)
    planted = {
        (3, 150): ("exact", LONG.upper(), LONG),
        (10, 90): ("exact", "I moved to a new town in May and know nobody here",
                   "I moved to a new town in May, and know nobody here!"),
        (20, 170): ("near", f"{LONG} even on holidays", f"Well, {LONG.lower()} again"),
        (40, 120): ("near", "We have been arguing about money every single evening since the baby came home with us",
                    "We have been arguing about money every single evening since the baby came home with me"),
    }  # fmt: skip
    for (one, other), (_, its, others) in planted.items():
        rows[one]["messages"] += turns(its, "I hear you.")
        rows[other]["messages"] += turns(others, "I hear you.")
    data = saved(tmp_path / "t.jsonl", rows)
    for seed in range(5):
        splits, report = prepare(DataConfig(data=data, split_seed=seed))

        assert (report.split, report.conversations, report.leak) == ("conversation", 200, 0)
        # The near copy of a shared turn joins that pair: rows 20 and 170 are near copies of 3 and 150.
        assert report.shared == {"exact": 4, "near": 4}
        assert report.overlap == {"exact": 0, "near": 0}
        side = {row["messages"][2]["content"]: name for name in SPLITS for row in splits[name]}
        for one, other in planted:
            assert side[rows[one]["messages"][2]["content"]] == side[rows[other]["messages"][2]["content"]]
        assert len(splits["train"]) < 190
    by_row, found = prepare(DataConfig(data=data, split="row"))
    held_out = {row["messages"][2]["content"] for name in ("val", "test") for row in by_row[name]}
    parted = [
        kind for (one, other), (kind, _, _) in planted.items()
        if (rows[one]["messages"][2]["content"] in held_out) != (rows[other]["messages"][2]["content"] in held_out)
    ]  # fmt: skip
    assert found.overlap["exact"] >= parted.count("exact")
    assert sum(found.overlap.values()) >= len(parted) > 0


def test_single_questions_are_split_as_before(tmp_path):
    """Near copies among them are counted; `conversation` keeps them on one side."""
    rows = [{"Context": f"{LONG} on {day} evening", "Response": f"{ANSWER} {n}"} for n, day in enumerate("abcdefghij")]
    rows += [{"Context": f"Number {n}?", "Response": f"{ANSWER} Then {n}."} for n in range(60)]
    data = saved(tmp_path / "t.jsonl", rows)

    splits, report = prepare(DataConfig(data=data))
    _, kept = prepare(DataConfig(data=data, split="conversation"))

    held_out = [row for name in ("val", "test") for row in splits[name] if LONG in row["question"]]
    assert report.overlap == {"exact": 0, "near": len(held_out)}
    assert len(held_out) > 0
    assert kept.overlap == {"exact": 0, "near": 0}
    assert "shared  " not in str(report)


def test_near_copies_are_those_of_an_exact_comparison():
    """All pairs of 60 edited turns, against a comparison of their five-word sequences without MinHash."""
    words = LONG.split()
    texts = [
        " ".join([*words[:at], *(f"x{at}y{k}" for k in range(n)), *words[at + n :]])
        for at in range(0, 20, 2)
        for n in (1, 2, 3, 6, 9, 12)
    ]
    rows = [{"question_id": f"{n:03}", "question": text, "answer": ANSWER} for n, text in enumerate(texts)]

    def grams(text: str) -> set[tuple[str, ...]]:
        split = text.lower().split()
        return {tuple(split[at : at + 5]) for at in range(len(split) - 4)}

    known = list(range(len(texts)))  # the smallest number that each turn is linked to
    for one, other in itertools.combinations(range(len(texts)), 2):
        shared, either = grams(texts[one]) & grams(texts[other]), grams(texts[one]) | grams(texts[other])
        if 2 * len(shared) >= len(either) and known[one] != known[other]:
            low, high = sorted((known[one], known[other]))
            known = [low if root == high else root for root in known]
    assert 3 < len(set(known)) < 50
    assert grouped(rows, shared_turns(rows)) == [f"{root:03}" for root in known]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64])
@settings(max_examples=30, deadline=None)
@given(text=st.text(alphabet="ab,;\"'\n\r&1\u00e9\U0001f622", max_size=60))
def test_text_in_parts_reads_as_the_whole(size, text):
    """Tables and JSON Lines give the same rows, or the same error, however the text is cut."""
    table = f"q,a\n{text}\nwhy,well\n"

    def chunks():
        return (table[at : at + size] for at in range(0, len(table), size))

    def table_or_error(parts: Callable[[], Iterator[str]]) -> object:
        try:
            found = delimited.stream_table(parts, "t.csv")
            return found.header, list(found.rows), found.format
        except UserError as error:
            return str(error)[:20]  # the words after a stray quote may be cut short

    assert table_or_error(chunks) == table_or_error(lambda: iter([table]))
    lines = "".join(json.dumps({"a": part}, ensure_ascii=False) + "\n" for part in text.split("1"))
    parts = [lines[at : at + size] for at in range(0, len(lines), size)]
    assert list(documents.read_lines(parts, "t")) == [{"a": part} for part in text.split("1")]


def test_a_long_file_is_read_in_parts_and_rows_leave_memory(tmp_path, monkeypatch, capsys):
    """With parts of 64 bytes and spools of 1 kB, plain and gzip files give the same rows; progress is shown."""
    rows = [{"q": f'caf\u00e9 {n}\n"x"', "a": f"{ANSWER} {n}"} for n in range(300)]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    table = "q,a\n" + "".join('"' + row["q"].replace('"', '""') + f'","{row["a"]}"\n' for row in rows)
    monkeypatch.setattr("train.decoding.CHUNK_BYTES", 64)
    monkeypatch.setattr(spool, "MEMORY_BYTES", 1000)
    for name, text in (("t.jsonl", lines), ("t.csv", table)):
        (tmp_path / name).write_text(text, encoding="utf-8")
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(text.encode()))
        assert load(str(tmp_path / name)).rows == load(str(tmp_path / f"{name}.gz")).rows == rows
    with (tmp_path / "t.jsonl").open("rb") as file:
        assert sum(1 for _ in Text(file, "t.jsonl").chunks()) > 100
    monkeypatch.setattr("train.meter.FIRST_AFTER_S", 0.0)
    meter = Meter("reading t.jsonl", 2_000_000, "MB", scale=1e6)
    meter.at(1_000_000)
    assert capsys.readouterr().err == "reading t.jsonl          1 of 2 MB\n"


def test_a_spool_is_a_sequence():
    """Slices, negative indexes, iteration and selections are those of a list."""
    rows = [{"n": n} for n in range(5)]
    spooled = Spool(rows)

    assert spooled == rows == list(spooled)
    assert (spooled[-1], spooled[1:3]) == (rows[-1], rows[1:3])
    assert Selection(spooled, [3, 1]) == [rows[3], rows[1]] != spooled
    with pytest.raises(IndexError):
        spooled[5]
    spooled[0]["n"] = 9
    assert spooled[0] == {"n": 0}


def test_several_files_and_patterns(tmp_path):
    """Names with commas between and patterns give all rows, also of different shapes; errors name the file."""
    one = saved(tmp_path / "a.jsonl", [{"messages": turns("Why?", ANSWER)}])
    two = tmp_path / "b.csv"
    two.write_text(f"question,answer\nWho?,{ANSWER} Now.\n", encoding="utf-8")
    comma = saved(tmp_path / "a,b.jsonl", [{"prompt": "Where?", "completion": ANSWER + " So."}])

    both = load_rows(DataConfig(data=f"{one}, {two}"))
    assert [row["question"] for row in both.cleaned.rows] == ["Why?", "Who?"]
    assert both.rows_in == 2
    assert both.read_as.startswith("2 files: JSON, one object, UTF-8; conversations in 'messages'")
    assert "; a table, comma between fields, UTF-8; 'question' as the question" in both.read_as
    assert [source.name for source in load_each(str(tmp_path / "[ab].*"))] == [one, str(two)]
    assert load_rows(DataConfig(data=comma)).cleaned.rows[0]["question"] == "Where?"
    for data, message in (
        (f"{one},{tmp_path}/c.jsonl", "no data file '.*c.jsonl'"),
        (str(tmp_path / "*.tsv"), "no file fits the pattern"),
        (str(tmp_path), "is a folder, but not one that `datasets` saved; name its files"),
    ):
        with pytest.raises(UserError, match=message):
            load_rows(DataConfig(data=data))


def test_a_folder_saved_by_datasets(tmp_path):
    """A data set, and the train part of one with parts."""
    from datasets import Dataset, DatasetDict

    rows = [{"messages": turns("Why?", ANSWER, "And?", "Rest.")}]
    Dataset.from_list(rows).save_to_disk(tmp_path / "one")
    DatasetDict({"train": Dataset.from_list(rows), "test": Dataset.from_list(rows)}).save_to_disk(tmp_path / "parts")
    DatasetDict({"test": Dataset.from_list(rows)}).save_to_disk(tmp_path / "test")

    for name, read_as in (("one", "saved by `datasets`"), ("parts", "saved by `datasets` (train; not used: test)")):
        loaded = load_rows(DataConfig(data=str(tmp_path / name)))
        assert conversation(loaded.cleaned.rows[0]) == turns("Why?", ANSWER, "And?", "Rest.")
        assert read_as in loaded.read_as
    with pytest.raises(UserError, match="no split named train; it has test"):
        load(str(tmp_path / "test"))


def test_parquet_holds_lists_of_turns(tmp_path):
    """As hub data sets store them."""
    from pyarrow import Table, parquet

    parquet.write_table(Table.from_pylist([{"messages": turns("Why?", ANSWER)}]), tmp_path / "t.parquet")

    assert load_rows(DataConfig(data=str(tmp_path / "t.parquet"))).cleaned.rows[0]["answer"] == ANSWER


def test_columns_of_no_known_shape_are_none():
    """They are left to the columns that the config names; rows with an author and a text are no turns."""
    assert documents.read_documents('{"data": [{"author": "Ann", "text": "x"}]}', "t")[1].endswith("under 'data'")
    assert recognized([{"q": "Why?", "a": ANSWER, "tags": ["x"]}], ["q", "a", "tags"]) is None


def test_the_shipped_dialogues_survive_cleaning():
    """40 conversations of 3 to 8 exchanges on a dozen topics or more, none dropped, changed or alike."""
    rows = load("dialogues").rows
    _, report = prepare(DataConfig(data="dialogues"))

    assert (report.rows_in, report.rows_out, report.conversations) == (40, 40, 40)
    assert report.changed == {}
    assert report.shared == {"exact": 0, "near": 0}
    assert {len(row["messages"]) // 2 for row in rows} == {3, 4, 5, 6, 7, 8}
    assert len({row["topic"] for row in rows}) >= 12
    assert all(clean(message["content"]) == message["content"] for row in rows for message in row["messages"])
    assert min(report.questions.values()) > 0


def test_the_report_shows_what_was_changed(tmp_path):
    """Printed and written: changed turns, exchanges, and shared turns."""
    rows = [row | {"messages": [*row["messages"], {"role": U, "content": "bye"}]} for row in talks(60)]
    _, report = prepare(DataConfig(data=saved(tmp_path / "t.jsonl", rows)))

    assert dataclasses.asdict(report)["changed"] == {"user turn without a reply cut from the end": 60}
    assert "  changed         60  user turn without a reply cut from the end" in str(report)
    assert "exchanges    per row: median 3, p95 3, max 3" in str(report)
    assert "shared             0  conversations share a user turn, 0 more a near copy; kept on one side" in str(report)
