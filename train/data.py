"""Conversations: loads, cleans, de-duplicates and splits them by question, and reports what was done.

A data set has one row per answer, and most questions have several answers. So rows are split by question: a random
split of rows would put most test questions in training too, with another answer, and inflate the scores.

    splits, report = prepare(DataConfig(data="conversations.csv", question_column="question"))
    print(report)
    write(Path("runs/first"), splits, report)      # data/{train,val,test}.jsonl, then data/report.json
"""

import dataclasses
import hashlib
import math
import statistics
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from counsel.errors import UserError
from counsel.files import write_json, write_jsonl
from train.cleaning import clean, count_words, drop_reason, normalized, question_id
from train.contacts import contacts, mask
from train.sources import Source, load

Item = TypeVar("Item")

SPLITS = ("train", "val", "test")
DEFAULT_TOPIC_COLUMN = "topic"

Row = dict[str, str]
Splits = dict[str, list[Row]]

MAX_EXAMPLES = 3
# Characters of a row shown around the reason for dropping it.
EXCERPT_CHARS = 80


@dataclass(frozen=True)
class DataConfig:
    """Where conversations come from and how they are split. A `Recipe` has the same fields.

    data: a CSV, TSV, JSON, JSONL or Parquet file, also compressed, a hub id (org/name), or `sample`, the shipped set.
    revision: commit, tag or branch of a hub data set; empty means the newest.
    contacts: `drop` rows with links, e-mail addresses or phone numbers, or `mask` those parts ("[link]").
    val_share, test_share: shares of the questions.
    split: `question`; or `row`, which leaks and exists only to measure how much.
    """

    data: str = "sample"
    revision: str = ""
    question_column: str = "Context"
    answer_column: str = "Response"
    topic_column: str = DEFAULT_TOPIC_COLUMN
    contacts: str = "drop"
    val_share: float = 0.1
    test_share: float = 0.1
    split: str = "question"
    split_seed: int = 0


@dataclass(frozen=True)
class Report:
    """What happened to every row, in counts. Lengths are in words.

    dropped: rows by reason. Each row counts once, under the first reason that applies.
    masked: rows in which a link, an e-mail address or a phone number was masked, by kind.
    examples: the first rows dropped for each reason, as `row 7: '...'`. Never written to disk: they contain contacts.
    read_as: the detected format (encoding, separator, compression), and columns that were matched by a similar name.
    leak: questions in more than one split; 0 unless `split` is `row`.
    row_split_leak: the share of test questions that a random row split of the same rows would put in training too.
    """

    source: str
    revision: str
    source_sha256: str
    read_as: str
    split: str
    split_seed: int
    rows_in: int
    rows_out: int
    dropped: dict[str, int]
    masked: dict[str, int]
    examples: dict[str, list[str]]
    questions: dict[str, int]
    rows: dict[str, int]
    leak: int
    row_split_leak: float
    answers_per_question: dict[str, float]
    question_words: dict[str, float]
    answer_words: dict[str, float]

    def __str__(self) -> str:
        commit = f" at {self.revision[:12]}" if self.revision else ""
        lines = [f"data         {self.source}{commit} (sha256 {self.source_sha256[:12]})"]
        lines += [f"read as      {self.read_as}"]
        lines += [f"rows in      {self.rows_in:>7,}"]
        lines += [f"  dropped    {n:>7,}  {reason}" for reason, n in self.dropped.items()]
        lines += [f"  masked     {n:>7,}  {kind}" for kind, n in self.masked.items()]
        lines += [f"rows out     {self.rows_out:>7,}  answers to {sum(self.questions.values()):,} questions"]
        lines += [f"  {name:<10} {self.rows[name]:>7,}  {self.questions[name]:,} questions" for name in SPLITS]
        for label, stats in (("questions", self.question_words), ("answers", self.answer_words)):
            lines += [f"words        {label}: median {stats['median']:g}, p95 {stats['p95']:g}, max {stats['max']:g}"]
        per = self.answers_per_question
        lines += [f"answers      per question: mean {per['mean']:.1f}, max {per['max']:g}"]
        lines += [f"leak         {self.leak:>7,}  questions in more than one split"]
        would = "would put" if self.split == "question" else "put"
        lines += [f"{'':>22}a random row split {would} {self.row_split_leak:.0%} of test questions in training too"]
        return "\n".join(lines)


class Cleaned(NamedTuple):
    """The rows worth keeping, in order of first appearance, and the `dropped`, `masked` and `examples` of a Report."""

    rows: list[Row]
    dropped: dict[str, int]
    masked: dict[str, int]
    examples: dict[str, list[str]]


class LoadedRows(NamedTuple):
    """Rows as the source has them, the same rows cleaned, and how they were read, in words."""

    source: Source
    cleaned: Cleaned
    read_as: str


def prepare(config: DataConfig) -> tuple[Splits, Report]:
    """Load, clean, de-duplicate and split. Raises UserError if the source or the config is unusable."""
    source, cleaned, read_as = load_rows(config)
    rows = cleaned.rows
    splits = full_splits(rows, config)
    leaked = leak(splits)
    assert config.split == "row" or leaked == 0
    by_row = split_rows(rows, dataclasses.replace(config, split="row"))
    report = Report(
        source=config.data,
        revision=source.revision,
        source_sha256=source.sha256,
        read_as=read_as,
        split=config.split,
        split_seed=config.split_seed,
        rows_in=len(source.rows),
        rows_out=len(rows),
        dropped=cleaned.dropped,
        masked=cleaned.masked,
        examples=cleaned.examples,
        questions={name: len(_questions(splits[name])) for name in SPLITS},
        rows={name: len(splits[name]) for name in SPLITS},
        leak=leaked,
        row_split_leak=leak_share(by_row),
        answers_per_question=_statistics(list(Counter(row["question_id"] for row in rows).values())),
        question_words=_statistics([count_words(text) for text in {row["question"] for row in rows}]),
        answer_words=_statistics([count_words(row["answer"]) for row in rows]),
    )
    return splits, report


def load_rows(config: DataConfig) -> LoadedRows:
    """Load and clean the rows. Raises UserError if the source or the config is unusable."""
    _check_config(config)
    source = load(config.data, config.revision)
    columns, renamed = with_columns(config, source.columns)
    cleaned = clean_rows(source.rows, columns)
    if not cleaned.rows:
        reasons = ", ".join(f"{n} {reason} (such as {cleaned.examples[reason][0]})"
                            for reason, n in cleaned.dropped.items())  # fmt: skip
        raise UserError(f"no row of {config.data!r} is usable; dropped: {reasons}")
    return LoadedRows(source, cleaned, "; ".join([source.read_as, *renamed]))


def _check_config(config: DataConfig) -> None:
    shares = (config.val_share, config.test_share)
    if min(shares) < 0 or sum(shares) >= 1:
        raise UserError(f"val_share and test_share are {shares}; each must be 0 or more, together under 1")
    if config.split not in ("question", "row"):
        raise UserError(f"split is {config.split!r}; it must be question or row")
    if config.contacts not in ("drop", "mask"):
        raise UserError(f"contacts is {config.contacts!r}; it must be drop or mask")


def write(run_path: Path, splits: Splits, report: Report) -> None:
    """Write data/{train,val,test}.jsonl under `run_path`, and data/report.json last."""
    for name in SPLITS:
        write_jsonl(run_path / "data" / f"{name}.jsonl", splits[name])
    document = dataclasses.asdict(report)
    del document["examples"]
    write_json(run_path / "data" / "report.json", document)


def clean_rows(raw: Sequence[dict[str, Any]], config: DataConfig) -> Cleaned:
    """Clean every row, and drop those that are unfit for training.

    Of several copies of one pair the longest is kept, because the others lost their paragraph breaks. All rows of a
    question get its longest text. An answer that was pasted under several questions is kept only under the first.
    """
    dropped: Counter[str] = Counter()
    masked: Counter[str] = Counter()
    examples: dict[str, list[str]] = {}
    pairs: dict[tuple[str, str], Row] = {}
    exact: set[tuple[str, str]] = set()
    owner: dict[str, str] = {}
    question_text: dict[str, str] = {}

    def drop(reason: str, number: int, excerpt: str) -> None:
        dropped[reason] += 1
        if len(examples.setdefault(reason, [])) < MAX_EXAMPLES:
            examples[reason].append(f"row {number}: {excerpt!r}")

    for number, fields in enumerate(raw, start=1):
        question, answer = (
            clean(_text(fields.get(column), column, number))
            for column in (config.question_column, config.answer_column)
        )
        topic = clean(_label(fields.get(config.topic_column)))
        masked_kinds: set[str] = set()
        if config.contacts == "mask":
            masked_kinds = {contact.kind for text in (question, answer) for contact in contacts(text)}
            question, answer = mask(question), mask(answer)
        if reason := drop_reason(question, answer):
            drop(reason, number, _excerpt(reason, question, answer))
            continue
        key = (question_id(question), normalized(answer))
        if owner.setdefault(key[1], key[0]) != key[0]:
            drop("answer given to another question", number, _shortened(answer))
            continue
        if key in pairs:
            reason = "duplicate" if (question, answer) in exact else "duplicate but for spaces, case, punctuation"
            drop(reason, number, _shortened(answer))
        else:
            masked.update(masked_kinds)
        exact.add((question, answer))
        kept = pairs.setdefault(key, {"question_id": key[0], "question": "", "answer": "", "topic": topic})
        kept["answer"] = max(kept["answer"], answer, key=len)
        kept["topic"] = kept["topic"] or topic
        question_text[key[0]] = max(question_text.get(key[0], ""), question, key=len)
    for row in pairs.values():
        row["question"] = question_text[row["question_id"]]
    return Cleaned(list(pairs.values()), dict(dropped.most_common()), dict(masked.most_common()), examples)


def _excerpt(reason: str, question: str, answer: str) -> str:
    """The part of a row that it was dropped for, with the text around it."""
    for text in (question, answer):
        for contact in contacts(text):
            if contact.kind == reason:
                room = max(0, EXCERPT_CHARS - (contact.end - contact.start)) // 2
                return _shortened(text[max(0, contact.start - room) :])
    return _shortened(question if reason == "empty answer" else answer)


def _shortened(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= EXCERPT_CHARS else f"{text[:EXCERPT_CHARS]}..."


def split_rows(rows: Sequence[Row], config: DataConfig) -> Splits:
    """Put each row in `train`, `val` or `test` by a hash of the seed and the question (of the row, for a `row` split).

    Nothing else decides, so adding rows never moves a question to another split.
    """
    splits: Splits = {name: [] for name in SPLITS}
    for row in rows:
        key = row["question_id"] if config.split == "question" else row["question_id"] + normalized(row["answer"])
        digest = hashlib.sha256(f"{config.split_seed} {key}".encode()).digest()
        place = int.from_bytes(digest[:8]) / 2**64
        name = (
            "test" if place < config.test_share else "val" if place < config.test_share + config.val_share else "train"
        )
        splits[name].append(row)
    return splits


def full_splits(rows: Sequence[Row], config: DataConfig) -> Splits:
    """The same as `split_rows`. Raises UserError if a split whose share is above 0 got no row."""
    splits = split_rows(rows, config)
    for name, share in zip(SPLITS, (1.0, config.val_share, config.test_share), strict=True):
        if share and not splits[name]:
            count = len(_questions(rows))
            raise UserError(f"the {name} split is empty with {count} questions; give more data or another split_seed")
    return splits


def evenly_spaced(items: Sequence[Item], limit: int | None) -> list[Item]:
    """At most `limit` items, evenly spaced, because neighbors in a data set are similar."""
    if limit is None or len(items) <= limit:
        return list(items)
    return [items[index * len(items) // limit] for index in range(limit)]


def leak(splits: Splits) -> int:
    """The number of questions in more than one split."""
    n_splits = Counter(question for name in SPLITS for question in _questions(splits[name]))
    return sum(count > 1 for count in n_splits.values())


def leak_share(splits: Splits) -> float:
    """The share of the test questions that are in training too; 0 without test questions."""
    test = _questions(splits["test"])
    return len(test & _questions(splits["train"])) / len(test) if test else 0.0


def _questions(rows: Sequence[Row]) -> set[str]:
    return {row["question_id"] for row in rows}


def _statistics(values: list[int]) -> dict[str, float]:
    ordered = sorted(values)
    return {
        "mean": round(statistics.fmean(ordered), 2),
        "median": statistics.median(ordered),
        "p95": ordered[math.ceil(0.95 * len(ordered)) - 1],
        "max": ordered[-1],
    }


def with_columns(config: DataConfig, present: Sequence[str]) -> tuple[DataConfig, list[str]]:
    """The config with each column as it is named in `present`, and a note for each name that differs.

    An exact match wins; otherwise one that differs only in case and outer spaces. Raises UserError if there is none, or
    if there are several.
    """
    notes: list[str] = []

    def find(name: str, wanted: str) -> str:
        matches = [column for column in present if column == wanted]
        matches = matches or [column for column in present if _folded(column) == _folded(wanted)]
        if len(matches) > 1:
            names = " and ".join(map(repr, matches))
            raise UserError(
                f"{config.data!r} has {len(matches)} columns with the same name, {names}; rename or remove one"
            )
        if not matches and (name != "topic_column" or wanted != DEFAULT_TOPIC_COLUMN):
            raise UserError(_no_column(present, config, name))
        if matches and matches[0] != wanted:
            notes.append(f"{matches[0]!r} used as {wanted!r}")
        return matches[0] if matches else wanted

    columns = dataclasses.replace(
        config,
        question_column=find("question_column", config.question_column),
        answer_column=find("answer_column", config.answer_column),
        topic_column=find("topic_column", config.topic_column),
    )
    return columns, notes


def _no_column(present: Sequence[str], config: DataConfig, name: str) -> str:
    wanted, shown = getattr(config, name), [column if len(column) <= 40 else f"{column[:40]}..." for column in present]
    if any(len(column) > 60 or "\n" in column for column in present):
        return (
            f"{config.data!r} has no header row: its first line contains {shown[0]!r}; add a first line with the "
            f"column names, such as {config.question_column},{config.answer_column}"
        )
    listed = ", ".join(map(repr, shown[:12])) + (f" and {len(shown) - 12} more" if len(shown) > 12 else "")
    option_name = name.replace("_", "-")
    return f"{config.data!r} has no column {wanted!r}, only {listed}; name the right one with --{option_name}"


def _folded(column: str) -> str:
    return unicodedata.normalize("NFKC", column).strip().casefold()


def _text(value: Any, column: str, number: int) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if not isinstance(value, str):
        raise UserError(f"row {number}: {column} is {type(value).__name__} {str(value)[:40]!r}; it must be text")
    return value


def _label(value: Any) -> str:
    """A topic as text: strings, numbers and lists of them; anything else gives an empty topic."""
    if isinstance(value, list | tuple):
        return ", ".join(filter(None, map(_label, value)))
    is_label = isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value))
    return str(value) if is_label else ""
