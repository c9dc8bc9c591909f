"""Conversations are loaded, cleaned, and split so that no question is on both sides."""

import csv
import dataclasses
import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from counsel.errors import UserError
from counsel.files import read_json, read_jsonl
from train.cleaning import clean, drop_reason, normalized, question_id
from train.data import SPLITS, DataConfig, clean_rows, leak_share, prepare, split_rows, write
from train.sources import load

COUNSELCHAT = Path(__file__).parent.parent.parent / "shared" / "data" / "counselchat.jsonl"
ANSWER = "Take one small step today and rest."


@pytest.mark.parametrize(
    ("raw", "plain"),
    [
        ("<p>I&nbsp;can&#39;t   sleep.</p><p>Why?</p>", "I can't sleep.\n\nWhy?"),
        ("<p>One\nline,<br>then another.</p>", "One line,\nthen another."),
        ("Try:<ul><li>walk</li><li>rest</li></ul>Then tell.", "Try:\n\n- walk\n- rest\n\nThen tell."),
        ("<style>p {color: red}</style><!--[if mso]>x<![endif]--><b>Bold</b> &amp; calm", "Bold & calm"),
        ("a\u00a0b\u2003c\td  e", "a b c d e"),
        ("zero\u200bwidth\ufeff soft\u00adhyphen", "zerowidth softhyphen"),
        ("cafe\u0301", "caf\u00e9"),
        ("one\r\n\r\n\r\n\r\n two \u2028three", "one\n\ntwo\nthree"),
        ("a < b and 3 > 2, I <3 you", "a < b and 3 > 2, I <3 you"),
        ("a big influence.Otherwise, you can. e.g.This stays", "a big influence. Otherwise, you can. e.g.This stays"),
        ("\U0001f468\u200d\U0001f469", "\U0001f468\u200d\U0001f469"),
    ],
)
def test_clean_gives_plain_text(raw, plain):
    """Markup, entities and odd characters become plain text, and cleaning again changes nothing."""
    assert clean(raw) == plain
    assert clean(plain) == plain


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("See my page at www.example.org for much more", "link"),
        ("You can read it on https://example.io/post today", "link"),
        ("All of it is listed on mypractice.com for you", "link"),
        ("Write to me at anna.b@example.org whenever you like", "e-mail address"),
        ("You may reach me at 787-555-0178 to schedule it", "phone number"),
        ("You may reach me at (787) 555-0178 to schedule it", "phone number"),
        ("You may reach me at +44 20 7946 0018 to schedule", "phone number"),
        ("Please call 988 now, or 911 if it is urgent", None),
        ("Ring 116 123 at any hour, or text HOME to 741741", None),
        ("Call 1-800-273-8255, they always answer and it is free", None),
        ("From 1931-1932 it cost 1,200-1,500 a year", None),
        ("Rest.Net result is that you feel better soon", None),
        ("Talk to your doctor please", "answer under 6 words"),
        ("Talk to your own doctor please", None),
        (" \u200b ", "empty answer"),
    ],
)
def test_drop_reason_names_the_reason(answer, reason):
    """Contact details of people and short answers are reasons to drop a row; crisis numbers are not."""
    assert drop_reason("Why?", clean(answer)) == reason


def test_contact_details_in_a_question_are_a_reason():
    """The model must not learn a person's number from a question either."""
    assert drop_reason("Call me on 787-555-0178?", ANSWER) == "phone number"
    assert drop_reason("?!", ANSWER) == "empty question"


def test_copies_of_a_question_have_one_id():
    """Case, punctuation, spaces and character encoding do not make another question; a word does."""
    one = "I can't sleep. What helps?"

    assert normalized(one) == "icantsleepwhathelps"
    assert question_id(one) == hashlib.sha256(b"icantsleepwhathelps").hexdigest()[:16]
    assert question_id("i cant  sleep.\nWHAT helps") == question_id(one)
    assert question_id("I can\u2019t sleep.What helps?") == question_id(one)
    assert question_id("I can't sleep. Who helps?") != question_id(one)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("\u0915\u093f", "\u0915\u0940"),  # Hindi ki, kii: only the vowel sign differs
        ("\u092e\u0947\u0930\u093e \u092e\u0928", "\u092e\u0947\u0930\u0940 \u092e\u0928"),
        ("\u0995\u09be\u09b2", "\u0995\u09bf\u09b2"),  # Bengali kaal, kil
        ("\u0e1b\u0e49\u0e32", "\u0e1b\u0e48\u0e32"),  # Thai paa: aunt, and forest but for its tone
        ("\u0e01\u0e34\u0e19", "\u0e01\u0e31\u0e19"),  # Thai kin, kan
        ("\u0ba8\u0bbe\u0ba9\u0bcd", "\u0ba8\u0bc0\u0ba9\u0bcd"),  # Tamil naan, niin
        ("\u1780\u17b6", "\u1780\u17b7"),  # Khmer
        ("x\u0304 is low", "x\u0305 is low"),  # a mark that makes no single character with its letter
    ],
)
def test_vowel_signs_and_tones_are_part_of_a_word(one, other):
    """Questions that differ only in combining marks are different questions."""
    assert normalized(one) != normalized(other)
    assert question_id(one) != question_id(other)
    rows, dropped, _, _ = clean_rows(
        [{"Context": one, "Response": ANSWER}, {"Context": other, "Response": f"{ANSWER} Then walk."}], DataConfig()
    )
    assert [row["question"] for row in rows] == [one, other]
    assert dropped == {}


def test_the_encoding_of_a_mark_makes_no_other_question():
    """Composed or decomposed, joined or not, emoji or symbol, with a dot that case-folding adds: copies of one text."""
    assert normalized("caf\u00e9") == normalized("cafe\u0301") == normalized("cafe\u200d\u0301") == "caf\u00e9"
    assert normalized("\u0b95\u0bca") == normalized("\u0b95\u0bc6\u0bbe")  # Tamil ko, whole and in two parts
    assert normalized("love \u2764\ufe0f you") == normalized("love \u2764 you") == "loveyou"
    assert normalized("\u0130yi misin") == normalized("iyi misin") == "iyimisin"
    assert normalized(" _-!") == ""


def test_duplicates_are_dropped_and_counted():
    """Of six rows, one repeats a pair, one differs in case and breaks only, one has it under another question."""
    raw = [
        {"Context": "I can't sleep, ever", "Response": "Get up. Read a dull book."},
        {"Context": "I can't sleep, ever", "Response": "Get up. Read a dull book."},
        {"Context": "i cant sleep ever!", "Response": "<p>get up.</p><p>Read a dull book.</p>", "topic": "sleep"},
        {"Context": "Why am I tired?", "Response": "Get up. Read a dull book."},
        {"Context": "I can't sleep, ever", "Response": "Keep one hour of waking, every day."},
        {"Context": "I can't sleep, ever", "Response": None},
    ]
    rows, dropped, _, examples = clean_rows(raw, DataConfig())

    # The copy with its paragraph break is kept, and both rows get the same text of the question.
    assert [(row["question"], row["answer"]) for row in rows] == [
        ("I can't sleep, ever", "get up.\n\nRead a dull book."),
        ("I can't sleep, ever", "Keep one hour of waking, every day."),
    ]
    assert dropped == {
        "duplicate": 1,
        "duplicate but for spaces, case, punctuation": 1,
        "answer given to another question": 1,
        "empty answer": 1,
    }
    assert examples == {
        "duplicate": ["row 2: 'Get up. Read a dull book.'"],
        "duplicate but for spaces, case, punctuation": ["row 3: 'get up. Read a dull book.'"],
        "answer given to another question": ["row 4: 'Get up. Read a dull book.'"],
        "empty answer": ['row 6: "I can\'t sleep, ever"'],
    }


def made_rows(questions: int, answers: int) -> list[dict[str, str]]:
    """`questions` times `answers` raw rows, all different."""
    return [
        {"Context": f"Question number {q}?", "Response": f"{ANSWER} This is answer {a} to {q}."}
        for q in range(questions)
        for a in range(answers)
    ]


def splits_of(config: DataConfig, raw: list[dict[str, str]]) -> dict[str, str]:
    """Each question's split."""
    splits = split_rows(clean_rows(raw, config).rows, config)
    return {row["question_id"]: name for name in SPLITS for row in splits[name]}


def test_a_question_stays_in_its_split_when_rows_are_added():
    """Adding rows anywhere, in another order, moves no question; another seed moves many."""
    few, many = made_rows(120, 2), list(reversed(made_rows(300, 3)))
    before, after = splits_of(DataConfig(), few), splits_of(DataConfig(), many)

    assert {question: after[question] for question in before} == before
    assert splits_of(DataConfig(split_seed=1), few) != before


def test_split_follows_the_hash_of_seed_and_question():
    """The split of one question, computed by hand from its SHA-256."""
    raw = [{"Context": "Question number 7?", "Response": ANSWER}]
    digest = hashlib.sha256(f"5 {hashlib.sha256(b'questionnumber7').hexdigest()[:16]}".encode()).hexdigest()
    place = int(digest[:16], 16) / 16**16

    for test_share, val_share in ((place + 0.01, 0.0), (place - 0.01, 0.02), (0.0, place - 0.01)):
        expected = "test" if place < test_share else "val" if place < test_share + val_share else "train"
        config = DataConfig(test_share=test_share, val_share=val_share, split_seed=5)
        assert list(splits_of(config, raw).values()) == [expected]


def test_shares_are_of_questions():
    """With 2,000 questions, each held-out tenth is within four standard deviations (54) of 200."""
    found = list(splits_of(DataConfig(), made_rows(2000, 1)).values())

    assert abs(found.count("val") - 200) < 54
    assert abs(found.count("test") - 200) < 54


def test_only_the_row_split_leaks(tmp_path):
    """Every question has five answers: no question leaks by question, nearly all leak by row; the report has both."""
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in made_rows(100, 5)), encoding="utf-8")
    config = DataConfig(data=str(data))
    splits, report = prepare(config)
    leaky_splits, leaky = prepare(dataclasses.replace(config, split="row"))

    ids = [{row["question_id"] for row in splits[name]} for name in SPLITS]
    assert len(set.union(*ids)) == sum(map(len, ids)) == 100
    assert report.leak == 0
    # The same count in another way: test rows whose question is in training.
    train_questions = [row["question"] for row in leaky_splits["train"]]
    shared = {row["question"] for row in leaky_splits["test"] if row["question"] in train_questions}
    assert leaky.row_split_leak == len(shared) / len({row["question"] for row in leaky_splits["test"]}) > 0.9
    assert report.row_split_leak == leaky.row_split_leak
    assert leaky.leak >= len(shared)
    assert "leak               0  questions in more than one split" in str(report)
    assert f"would put {leaky.row_split_leak:.0%} of test questions in training too" in str(report)


def test_report_adds_up_and_is_written_with_the_rows(tmp_path):
    """Rows in equal rows out plus rows dropped; the files have the split rows; lengths are in words."""
    data = tmp_path / "rows.jsonl"
    raw = [*made_rows(40, 2), {"Context": "Short?", "Response": "No."}]
    data.write_text("".join(json.dumps(row) + "\n" for row in raw), encoding="utf-8")
    splits, report = prepare(DataConfig(data=str(data)))
    write(tmp_path / "run", splits, report)
    written = read_json(tmp_path / "run" / "data" / "report.json")

    # Dropped rows may contain what must not be kept.
    assert report.examples == {"answer under 6 words": ["row 81: 'No.'"]}
    assert written | {"examples": report.examples} == dataclasses.asdict(report)
    assert "examples" not in written
    assert (report.rows_in, report.rows_out, report.dropped) == (81, 80, {"answer under 6 words": 1})
    assert sum(report.rows.values()) == 80
    assert sum(report.questions.values()) == 40
    assert report.answers_per_question == {"mean": 2, "median": 2, "p95": 2, "max": 2}
    assert report.question_words == {"mean": 3, "median": 3, "p95": 3, "max": 3}
    assert report.answer_words["max"] == 7 + 6
    assert report.source_sha256 == hashlib.sha256(data.read_bytes()).hexdigest()
    for name in SPLITS:
        rows = read_jsonl(tmp_path / "run" / "data" / f"{name}.jsonl")
        assert rows == splits[name]
        assert all(list(row) == ["question_id", "question", "answer", "topic"] for row in rows)


def test_every_format_gives_the_same_rows(tmp_path):
    """CSV with a byte-order mark, JSON, JSON Lines under both names, and Parquet."""
    from pyarrow import Table, parquet

    rows = [{"q": "Why?", "a": 'He said "wait",\nthen left\u2028us.'}, {"q": "Who, me?", "a": "caf\u00e9"}]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    with (tmp_path / "t.csv").open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.DictWriter(file, ["q", "a"])
        writer.writeheader()
        writer.writerows(rows)
    (tmp_path / "t.json").write_text(json.dumps(rows), encoding="utf-8")
    (tmp_path / "lines.json").write_text(lines, encoding="utf-8")
    (tmp_path / "t.JSONL").write_text(lines, encoding="utf-8")
    parquet.write_table(Table.from_pylist(rows), tmp_path / "t.parquet")

    for name in ("t.csv", "t.json", "lines.json", "t.JSONL", "t.parquet"):
        assert load(str(tmp_path / name)).rows == rows, name


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.doc", "x", r"end in \.csv, \.tsv, .*, \.json, \.jsonl, .*\.parquet"),
        ("t.csv", "", "contains no rows"),
        ("t.csv", "Context,Response\n", "contains no rows"),
        ("t.csv", "Context,Response\nwhy,well,so\n", "line 2 has more fields"),
        ("t.json", '[{"Context": 1}', "is not JSON"),
        ("t.json", '["a"]', "a list of objects"),
        ("t.jsonl", '{"Context": "a"}\n{"Cont', "line 2 is not JSON"),
        ("t.parquet", "no such thing", "is not Parquet"),
        (
            "t.csv",
            "question,Response\nwhy,well\n",
            "no column 'Context', only 'question', 'Response'.*--question-column",
        ),
        ("t.jsonl", '{"Context": "a", "Response": ["b"]}', "row 1: Response is list"),
        (
            "t.csv",
            "Context,Response\nwhy,no\nwho,\n",
            r"no row .*: 1 answer under 6 words \(such as row 1: 'no'\), 1 empty answer \(such as row 2: 'who'\)",
        ),
        ("t.csv", f"Context,Response\nwhy,{ANSWER}\n", "split is empty with 1 questions"),
    ],
)
def test_bad_input_is_a_one_line_error(tmp_path, name, content, message):
    """An error in a file is one line that names the file."""
    path = tmp_path / name
    path.write_text(content, encoding="utf-8")

    with pytest.raises(UserError, match=message) as raised:
        prepare(DataConfig(data=str(path)))
    assert "\n" not in str(raised.value)


def test_a_hub_set_is_read_from_the_local_cache_at_its_commit(tmp_path):
    """Offline, a data set in the cache is read, with its commit; for another there is a clear error."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    folder = tmp_path / "hub" / "datasets--org--talks"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(commit, encoding="utf-8")
    (folder / "snapshots" / commit).mkdir(parents=True)
    lines = "".join(json.dumps(row) + "\n" for row in made_rows(2, 1))
    (folder / "snapshots" / commit / "combined.json").write_text(lines, encoding="utf-8")
    code = (
        "from counsel.errors import UserError; from train.sources import load; s = load('org/talks')\n"
        "print(len(s.rows), s.revision, s.rows[1]['Context'])\n"
        "try: load('org/absent', 'v1')\n"
        "except UserError as error: print(error)"
    )
    env = os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)

    assert done.stdout.splitlines() == [
        f"2 {commit} Question number 1?",
        "cannot reach the hub for 'org/absent'; check the network, give a file, or leave --data out to use the sample",
    ], done.stderr


def test_bad_settings_are_one_line_errors(tmp_path):
    """Missing files, text in an unknown encoding, and impossible settings are refused first."""
    cyrillic = tmp_path / "cyrillic.csv"
    cyrillic.write_bytes("Context,Response\nwhy,\u042f \u0443\u0441\u0442\u0430\u043b\n".encode("cp1251"))

    for config, message in (
        (DataConfig(data="nowhere/at/all.csv"), "no data file"),
        (DataConfig(data=str(cyrillic)), "is not UTF-8"),
        (DataConfig(revision="main"), "only a hub data set has revisions"),
        (DataConfig(val_share=0.5, test_share=0.5), "together under 1"),
        (DataConfig(split="topic"), "must be question or row"),
        (DataConfig(topic_column="theme"), "no column 'theme'.*--topic-column"),
    ):
        with pytest.raises(UserError, match=message):
            prepare(config)


def test_the_shipped_sample_survives_its_own_cleaning():
    """At least 60 questions and 150 answers over a dozen topics, none dropped, none changed by cleaning."""
    raw = load("sample").rows
    _, report = prepare(DataConfig())

    assert report.rows_in == report.rows_out >= 150
    assert sum(report.questions.values()) >= 60
    assert len({row["topic"] for row in raw}) >= 12
    assert all(clean(text) == text for row in raw for text in row.values())
    assert all(60 <= len(row["Response"].split()) <= 160 for row in raw)
    assert report.questions["test"] >= 8


@pytest.mark.skipif(not COUNSELCHAT.is_file(), reason=f"no {COUNSELCHAT.name} beside the checkout")
def test_counselchat(capsys):
    """Of 2,961 real rows, those kept have no markup and no contact details, and only the row split leaks."""
    config = DataConfig(data=str(COUNSELCHAT))
    splits, report = prepare(config)
    leaky = split_rows([row for name in SPLITS for row in splits[name]], dataclasses.replace(config, split="row"))
    with capsys.disabled():
        print(f"\n{report}")

    text = "\n".join(row["question"] + "\n" + row["answer"] for name in SPLITS for row in splits[name])
    text = re.sub(r"https?://www\.(thetrevorproject|suicidepreventionlifeline|glbthotline|childhelp)\.org", "", text)
    assert report.rows_in == 2961
    assert report.rows_out + sum(report.dropped.values()) == 2961
    assert not any(
        mark in text for mark in ("</", "<p", "<br", "&nbsp;", "\u00a0", "\u200b", "http", "www.", "787-466")
    )
    assert "800-273-8255" in text
    assert report.leak == 0
    assert leak_share(leaky) > 0.5
