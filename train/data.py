"""Conversations: loads, cleans, de-duplicates and splits them by question, and reports what was done.

A data set has one row per answer or conversation, and most questions have several answers. So rows are split by
question: a random split of rows would put most test questions in training too, with another answer, and inflate the
scores. Conversations that share a long user turn, or a near copy of one, stay together too (train/overlap.py).

    splits, report = prepare(DataConfig(data="conversations.csv", question_column="question"))
    print(report)
    write(Path("runs/first"), splits, report)      # data/{train,val,test}.jsonl, then data/report.json
"""

import dataclasses
import hashlib
import math
import statistics
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from counsel.chat import Message, conversation
from counsel.contacts import contacts, mask
from counsel.errors import UserError
from counsel.files import write_json, write_jsonl
from train import columns, overlap, shapes
from train.cleaning import clean, count_words, drop_excerpt, drop_reason, normalized, one_line, question_id
from train.copies import Copies
from train.data_report import SPLITS, Report
from train.meter import Meter
from train.shapes import Shape
from train.sources import Source, load_each
from train.spool import Row, Selection, Spool
from train.turns import Turn, repaired

Item = TypeVar("Item")

DEFAULT_QUESTION_COLUMN, DEFAULT_ANSWER_COLUMN, DEFAULT_TOPIC_COLUMN = "Context", "Response", "topic"

Splits = Mapping[str, Sequence[Row]]

SplitsT = TypeVar("SplitsT", bound=Splits)

MAX_EXAMPLES = 3


@dataclass(frozen=True)
class DataConfig:
    """Where conversations come from and how they are split. A `Recipe` has the same fields.

    data: a CSV, TSV, JSON, JSONL or Parquet file, also compressed, several of them, a folder that `datasets` saved, a
    hub id (org/name), or `sample` or `dialogues`, the shipped sets.
    revision: commit, tag or branch of a hub data set; empty means the newest.
    question_column, answer_column: where the file has neither and they are the defaults, its shape is recognized.
    contacts: `drop` rows with links, e-mail addresses or phone numbers, or `mask` those parts ("[link]").
    val_share, test_share: shares of the questions.
    split: `question`; `conversation`, which also keeps together rows that share a long user turn or a near copy of one,
    and which `question` means for data with conversations; or `row`, which leaks and exists only to measure how much.
    """

    data: str = "sample"
    revision: str = ""
    question_column: str = DEFAULT_QUESTION_COLUMN
    answer_column: str = DEFAULT_ANSWER_COLUMN
    topic_column: str = DEFAULT_TOPIC_COLUMN
    contacts: str = "drop"
    val_share: float = 0.1
    test_share: float = 0.1
    split: str = "question"
    split_seed: int = 0


class Cleaned(NamedTuple):
    """The rows worth keeping, in order of first appearance, and the counts of a Report: see there.

    A row has question_id, question (the first user turn), answer (the first reply) and topic, and a conversation with
    more than that also has messages: see counsel.chat.conversation.
    """

    rows: Spool
    dropped: dict[str, int]
    masked: dict[str, int]
    examples: dict[str, list[str]]


class LoadedRows(NamedTuple):
    """The cleaned rows of one or more files, the `changed` of a Report, and how the files were read, in words."""

    cleaned: Cleaned
    changed: dict[str, int]
    rows_in: int
    revision: str
    sha256: str
    read_as: str


class _Conversation(NamedTuple):
    """Turns as the source has them, and the place of the row there, such as `row 7`."""

    where: str
    turns: list[Turn]
    topic: str


def prepare(config: DataConfig) -> tuple[Splits, Report]:
    """Load, clean, de-duplicate and split. Raises UserError if the source or the config is unusable."""
    loaded = load_rows(config)
    rows, cleaned = loaded.cleaned.rows, loaded.cleaned
    shared = overlap.shared_turns(rows)
    n_conversations = sum("messages" in row for row in rows)
    if n_conversations and config.split == "question":
        config = dataclasses.replace(config, split="conversation")
    splits = _full(_placed(rows, config, shared), rows, config)
    leaked = leak(splits)
    by_row = split_rows(rows, dataclasses.replace(config, split="row"))
    held_out = [at for name in ("val", "test") for at in splits[name].indexes]
    words = {row["question_id"]: count_words(row["question"]) for row in rows}
    exchanges, answer_words = array("q"), array("q")
    for row in rows:
        replies = [message["content"] for message in conversation(row) if message["role"] == "assistant"]
        exchanges.append(len(replies))
        answer_words.extend(map(count_words, replies))
    report = Report(
        source=config.data,
        revision=loaded.revision,
        source_sha256=loaded.sha256,
        read_as=loaded.read_as,
        split=config.split,
        split_seed=config.split_seed,
        rows_in=loaded.rows_in,
        rows_out=len(rows),
        conversations=n_conversations,
        dropped=cleaned.dropped,
        masked=cleaned.masked,
        changed=loaded.changed,
        examples=cleaned.examples,
        questions={name: len(_questions(splits[name])) for name in SPLITS},
        rows={name: len(splits[name]) for name in SPLITS},
        leak=leaked,
        row_split_leak=leak_share(by_row),
        shared=dict(shared.within([at for at, row in enumerate(rows) if "messages" in row])),
        overlap=dict(shared.between(held_out, splits["train"].indexes)),
        answers_per_question=_statistics(list(Counter(row["question_id"] for row in rows).values())),
        exchanges=_statistics(exchanges),
        question_words=_statistics(list(words.values())),
        answer_words=_statistics(answer_words),
    )
    return splits, report


def load_rows(config: DataConfig) -> LoadedRows:
    """Load and clean the rows. Raises UserError if the source or the config is unusable."""
    _check_config(config)
    sources = load_each(config.data, config.revision)
    read_as: list[str] = []
    parts: list[tuple[Source, Shape, str]] = []
    for source in sources:
        shape, topic, notes = _shape_of(source, config)
        parts.append((source, shape, topic))
        described = "; ".join([source.read_as, *notes])
        read_as += [] if described in read_as else [described]
    conversations = (
        item
        for source, shape, topic in parts
        for item in _conversations(source.rows, shape, topic, f"{source.name} row" if len(parts) > 1 else "row")
    )
    rows_in = sum(len(source.rows) for source in sources)
    cleaned, changed = _clean(conversations, config.contacts, rows_in)
    if not cleaned.rows:
        reasons = ", ".join(f"{n} {reason} (such as {cleaned.examples[reason][0]})"
                            for reason, n in cleaned.dropped.items())  # fmt: skip
        raise UserError(f"no row of {config.data!r} is usable; dropped: {reasons or 'no turns in any row'}")
    sha256 = sources[0].sha256
    if len(sources) > 1:
        sha256 = hashlib.sha256("\n".join(source.sha256 for source in sources).encode()).hexdigest()
        read_as[0] = f"{len(sources)} files: {read_as[0]}"
    return LoadedRows(cleaned, changed, rows_in, sources[0].revision, sha256, "; ".join(read_as))


def _check_config(config: DataConfig) -> None:
    shares = (config.val_share, config.test_share)
    if min(shares) < 0 or sum(shares) >= 1:
        raise UserError(f"val_share and test_share are {shares}; each must be 0 or more, together under 1")
    if config.split not in ("question", "conversation", "row"):
        raise UserError(f"split is {config.split!r}; it must be question or row, or conversation")
    if config.contacts not in ("drop", "mask"):
        raise UserError(f"contacts is {config.contacts!r}; it must be drop or mask")


def _shape_of(source: Source, config: DataConfig) -> tuple[Shape, str, list[str]]:
    """The shape of a file's rows, the column of their topics, and notes on what was recognized.

    Columns of the configured names come first. Failing that, and if the config has the default names, the shape is
    recognized. Raises UserError if it is not.
    """
    present, data = source.columns, source.name
    names = (config.question_column, config.answer_column)
    shape, notes = None, []
    if names == (DEFAULT_QUESTION_COLUMN, DEFAULT_ANSWER_COLUMN) and None in [
        columns.matching(name, present, data) for name in names
    ]:
        shape = shapes.recognized(source.rows, present)
    wanted = {"topic-column": config.topic_column}
    if shape is None:
        wanted = {"question-column": names[0], "answer-column": names[1], **wanted}
    else:
        notes.append(shape.described)
        if shape.topic and config.topic_column == DEFAULT_TOPIC_COLUMN:
            return shape, shape.topic, notes
    found: dict[str, str] = {}
    for option, name in wanted.items():
        if option == "topic-column" and name == DEFAULT_TOPIC_COLUMN:
            found[option] = columns.matching(name, present, data) or name
        else:
            found[option] = columns.required(option, name, present, data, example=",".join(names))
        if found[option] != name:
            notes.append(f"{found[option]!r} used as {name!r}")
    shape = shape or shapes.pairs(found["question-column"], found["answer-column"])
    return shape, found["topic-column"], notes


def _conversations(
    rows: Iterable[shapes.RawRow], shape: Shape, topic_column: str, label: str = "row"
) -> Iterator[_Conversation]:
    for number, row in enumerate(rows, start=1):
        where = f"{label} {number}"
        topic = clean(shapes.as_label(row.get(topic_column)))
        for turns in shape.turns(row, where):
            yield _Conversation(where, turns, topic)


def write(run_path: Path, splits: Splits, report: Report) -> None:
    """Write data/{train,val,test}.jsonl under `run_path`, and data/report.json last."""
    for name in SPLITS:
        write_jsonl(run_path / "data" / f"{name}.jsonl", splits[name])
    document = dataclasses.asdict(report)
    del document["examples"]
    write_json(run_path / "data" / "report.json", document)


def clean_rows(raw: Sequence[dict[str, Any]], config: DataConfig) -> Cleaned:
    """Clean rows of one question and one answer in the columns that `config` names, and drop those that are unfit.

    Of several copies of one pair the longest is kept, because the others lost their paragraph breaks. All rows of a
    question get its longest text. An answer that was pasted under several questions is kept only under the first.
    """
    shape = shapes.pairs(config.question_column, config.answer_column)
    return _clean(_conversations(raw, shape, config.topic_column), config.contacts, len(raw))[0]


def _clean(conversations: Iterable[_Conversation], contacts_rule: str, n_rows: int) -> tuple[Cleaned, dict[str, int]]:
    """Clean conversations like `clean_rows`; also return how many of their turns were changed, by kind.

    A contact in any turn drops the whole conversation.
    """
    dropped: Counter[str] = Counter()
    masked: Counter[str] = Counter()
    changed: Counter[str] = Counter()
    examples: dict[str, list[str]] = {}
    copies = Copies()
    meter = Meter("cleaning", n_rows, "rows")

    def drop(reason: str, where: str, excerpt: str) -> None:
        dropped[reason] += 1
        if len(examples.setdefault(reason, [])) < MAX_EXAMPLES:
            examples[reason].append(f"{where}: {excerpt!r}")

    for number, (where, turns, topic) in enumerate(conversations):
        meter.at(number)
        messages, changes = repaired(turns)
        masked_kinds: set[str] = set()
        if contacts_rule == "mask":
            masked_kinds = {contact.kind for message in messages for contact in contacts(message["content"])}
            messages = [message | {"content": mask(message["content"])} for message in messages]
        said = [message["content"] for message in messages if message["role"] != "system"]
        question, *rest = said or [""]
        if reason := drop_reason(question, *rest):
            drop(reason, where, drop_excerpt(reason, said or [clean(turn.text) for turn in turns if turn.text.strip()]))
            continue
        row = _row(messages, said, topic)
        if reason := copies.add(row, said):
            drop(reason, where, one_line(row["answer"]))
        if not reason:
            masked.update(masked_kinds)
            changed.update(changes)
    meter.done()
    cleaned = Cleaned(copies.rows(), dict(dropped.most_common()), dict(masked.most_common()), examples)
    return cleaned, dict(changed.most_common())


def _row(messages: list[Message], said: Sequence[str], topic: str) -> Row:
    row: Row = {
        "question_id": question_id(overlap.opening(said[::2])),
        "question": said[0],
        "answer": said[1],
        "topic": topic,
    }
    return row if len(messages) == 2 else row | {"messages": messages}


def split_rows(rows: Sequence[Row], config: DataConfig) -> Splits:
    """Put each row in `train`, `val` or `test` by a hash of the seed and its question, conversation or row.

    Nothing else decides, so adding rows never moves a question to another split; of conversations, only those that the
    new rows link to others.
    """
    needed = config.split == "conversation"
    return _placed(rows, config, overlap.shared_turns(rows) if needed else None)


def _placed(rows: Sequence[Row], config: DataConfig, shared: overlap.SharedTurns | None) -> dict[str, Selection]:
    """The same as `split_rows`. shared: needed for a split by conversation."""
    if config.split == "row":
        keys: Iterable[str] = (row["question_id"] + normalized(_replies(row)) for row in rows)
    elif config.split == "question":
        keys = (row["question_id"] for row in rows)
    else:
        assert shared is not None
        keys = overlap.grouped(rows, shared)
    indexes: dict[str, array[int]] = {name: array("Q") for name in SPLITS}
    for at, key in enumerate(keys):
        digest = hashlib.sha256(f"{config.split_seed} {key}".encode()).digest()
        place = int.from_bytes(digest[:8]) / 2**64
        name = (
            "test" if place < config.test_share else "val" if place < config.test_share + config.val_share else "train"
        )
        indexes[name].append(at)
    return {name: Selection(rows, indexes[name]) for name in SPLITS}


def _replies(row: Row) -> str:
    """What tells a row from others of its question: its answer; of a conversation, all turns after the first."""
    if "messages" not in row:
        return str(row["answer"])
    turns = [message["content"] for message in conversation(row) if message["role"] != "system"]
    return "\n".join(turns[1:])


def full_splits(rows: Sequence[Row], config: DataConfig) -> Splits:
    """The same as `split_rows`. Raises UserError if a split whose share is above 0 got no row."""
    return _full(split_rows(rows, config), rows, config)


def _full(splits: SplitsT, rows: Sequence[Row], config: DataConfig) -> SplitsT:
    for name, share in zip(SPLITS, (1.0, config.val_share, config.test_share), strict=True):
        if share and not splits[name]:
            count = len(_questions(rows))
            linked = " (those that share turns count as one)" if config.split == "conversation" else ""
            raise UserError(
                f"the {name} split is empty with {count} questions{linked}; give more data or another split_seed"
            )
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


def _statistics(values: Sequence[int]) -> dict[str, float]:
    ordered = sorted(values)
    return {
        "mean": round(statistics.fmean(ordered), 2),
        "median": statistics.median(ordered),
        "p95": ordered[math.ceil(0.95 * len(ordered)) - 1],
        "max": ordered[-1],
    }
