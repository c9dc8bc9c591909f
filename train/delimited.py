"""Reads CSV and similar tables: detects the separator and the quoting, and rejects a stray quote.

Python's and pandas' readers take an opening quote without a partner as the start of a field of many lines, and silently
lose the rows after it. Here every quoted field must end where a field can end.

    table = read_table(text, "talks.csv")
    table.header, table.rows, table.format        # ["q", "a"], [["why?", "well"]], "semicolon between fields"

The text may be read in chunks, twice or more: first to find the dialect and every fault, then for the rows.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from counsel.errors import UserError

_SEPARATORS = {",": "comma", ";": "semicolon", "\t": "tab", "|": "bar"}
# Excel's hint in the first line: sep=;
_SEPARATOR_LINE = re.compile(r'"?sep=([^\r\n])"?[ \t]*(?:\r\n|\r|\n|\Z)', re.IGNORECASE)
_LINE_END = re.compile(r"\r\n|\r|\n")
_INCHES = re.compile(r"[\d'\u2019]\s*\"$")
_WORDS = re.compile(r"[^\W\d_]{2,}")
# This many lines in one quoted field that each read as a row are rows, swallowed by a stray quote.
MIN_SWALLOWED_LINES = 3
# If another separator leads to a fault, this share of the rows must be as long as the header.
MIN_FITTING_SHARE = 0.9
# The part of the text that is enough to see a sep= line, blank first lines and the separators of a header.
HEAD_CHARS = 10_000

# Reads a text from its start, in parts.
Chunks = Callable[[], Iterator[str]]


class Table(NamedTuple):
    """A header, rows with at most as many fields, and a description of the separator and quoting."""

    header: list[str]
    rows: list[list[str]]
    format: str


class Stream(NamedTuple):
    """A table whose rows are read when they are needed."""

    header: list[str]
    rows: Iterator[list[str]]
    format: str


class _Fault(Exception):
    """A malformed line: what is wrong, and where."""


class _Unclosed(_Fault):
    """A quote that nothing closes in the text so far."""


@dataclass(frozen=True)
class _Dialect:
    """separator: empty for a table of one column. quote: one character. escape: a backslash, or empty.

    references: the semicolon of &#128546; does not end a field. Excel writes characters that Windows-1252 lacks as
    references, without quotes.
    """

    separator: str
    quote: str = '"'
    escape: str = ""
    references: bool = False

    def patterns(self) -> "_Patterns":
        separator, quote, escape = (re.escape(char) for char in (self.separator, self.quote, self.escape))
        escaped = rf"{escape}.|" if escape else ""
        whole = escaped + (r"&(?:#\d+|#x[0-9a-fA-F]+|amp|lt|gt|quot|apos|nbsp);|" if self.references else "")
        return _Patterns(
            opening=re.compile(rf" *{quote}"),
            quoted=re.compile(rf" *{quote}((?:[^{quote}{escape}]++|{escaped}{quote}{quote})*+){quote}", re.DOTALL),
            plain=re.compile(rf"(?:{whole}[^{separator}\r\n])*+", re.DOTALL),
            end=re.compile(rf" *(?={separator or '(?!)'}|[\r\n]|\Z)"),
        )

    def __str__(self) -> str:
        parts = [f"{_SEPARATORS.get(self.separator, repr(self.separator))} between fields"] if self.separator else []
        parts += [f"fields in {self.quote}"] if self.quote != '"' else []
        parts += ["quotes escaped by a backslash"] if self.escape else []
        return ", ".join(parts) or "one column"


class _Patterns(NamedTuple):
    """Patterns for a field's opening quote, a quoted field, any other field, and the position where a field can end."""

    opening: re.Pattern[str]
    quoted: re.Pattern[str]
    plain: re.Pattern[str]
    end: re.Pattern[str]


@dataclass
class _Record:
    """One row: the number of its first line, its source text, its fields, and how they were quoted."""

    line: int
    source: str = ""
    fields: list[str] = field(default_factory=list)
    n_quoted: int = 0
    spans_lines: bool = False
    closes_unopened: bool = False
    has_inches: bool = False


def read_table(text: str, name: str) -> Table:
    """The table in `text`. Raises UserError that names the line of a stray quote or separator."""
    table = stream_table(lambda: iter([text]), name)
    return Table(table.header, list(table.rows), table.format)


def stream_table(chunks: Chunks, name: str) -> Stream:
    """The table in a text given in parts. Raises UserError like `read_table`, before the first row is read."""
    head = _head(chunks)
    line, start, hint = 1, 0, _SEPARATOR_LINE.match(head)
    if hint:
        start, line = hint.end(), 2
    blank = re.compile(r"(?:[ \t]*(?:\r\n|\r|\n))*").match(head, start)
    assert blank is not None
    start, line = blank.end(), line + len(_LINE_END.findall(blank[0]))
    body = _Body(chunks, start, line)
    faults: list[_Fault] = []
    has_references = any("&" in chunk for chunk in chunks())
    kinds: list[dict[str, Any]] = [{}, *([{"references": True}] if has_references else []), {"escape": "\\"}]
    for kind in kinds:
        readings: list[tuple[float, int, list[str], _Dialect]] = []
        for dialect in _candidates(head[start:], body, hint[1] if hint else "", kind):
            try:
                header, fitting = _checked(body, dialect)
            except _Fault as fault:
                faults.append(fault)
                continue
            readings.append((fitting, len(header), header, dialect))
        if readings:
            fitting, _, header, dialect = max(readings, key=lambda scored: scored[:2])
            # A table cut at the wrong character may read without a fault, but its rows differ in length.
            if not faults or fitting >= MIN_FITTING_SHARE:
                described = f"{dialect}{', as its sep= line says' if hint else ''}"
                return Stream(header, _rows(body, dialect, len(header)), described)
    raise UserError(f"{name!r} {faults[0]}")


def _head(chunks: Chunks) -> str:
    """The first part of the text: more than blank lines, and HEAD_CHARS if the text is that long."""
    head = ""
    for chunk in chunks():
        head += chunk
        if len(head) >= HEAD_CHARS and head.strip():
            break
    return head


class _Body(NamedTuple):
    """The text from its header on. start: its first character. line: the number of its first line."""

    chunks: Chunks
    start: int
    line: int


def _candidates(head: str, body: _Body, hint: str, kind: dict[str, Any]) -> list[_Dialect]:
    """The dialects in which the header can be read, most columns first. A hint leaves one."""
    quote = "'" if re.match(r"'[^'\r\n]*'([^'\r\n])'[^'\r\n]*'(?:\1'[^'\r\n]*')*[ ]*(?:[\r\n]|\Z)", head) else '"'
    if hint:
        return [_Dialect(hint, quote, **kind)]
    columns = {}
    for separator in _SEPARATORS:
        dialect = _Dialect(separator, quote, **kind)
        try:
            columns[dialect] = len(next(_records(body, dialect), _Record(1)).fields)
        except _Fault:
            columns[dialect] = head.count(separator, 0, HEAD_CHARS) + 1
    several = [dialect for dialect, n in columns.items() if n > 1]
    return sorted(several, key=lambda dialect: -columns[dialect]) or [_Dialect("", quote, **kind)]


def _header(records: Iterator[_Record]) -> list[str]:
    head = next(records, None)
    return _without_empty_end(head.fields, 0) if head else []


def _without_empty_end(fields: list[str], n_columns: int) -> list[str]:
    """Fields without the empty ones at their end, as long as there are more than `n_columns`."""
    while len(fields) > n_columns and not fields[-1].strip():
        fields.pop()
    return fields


def _rows(body: _Body, dialect: _Dialect, n_columns: int) -> Iterator[list[str]]:
    records = _records(body, dialect)
    next(records, None)
    for record in records:
        yield _without_empty_end(record.fields, n_columns)


def _checked(body: _Body, dialect: _Dialect) -> tuple[list[str], float]:
    """The header, and the share of the rows that are as long. Raises _Fault for the first sign of a lost row."""
    records = _records(body, dialect)
    header = _header(records)
    n_columns = len(header)
    n_rows = n_fitting = n_broken = n_swallowing = 0
    first_inches = first_swallowing = 0
    quoting: Counter[bool] = Counter()
    before_is_short = False
    for record in records:
        row = _without_empty_end(record.fields, n_columns)
        if len(row) > n_columns:
            contents = "commas" if dialect.separator == "," else f"the separator {dialect.separator!r}"
            raise _Fault(
                f"line {record.line} has more fields than the header; quote the fields that contain {contents}"
            )
        is_short = len(row) < n_columns
        if is_short and record.spans_lines and dialect.separator in record.source:
            raise _Fault(_opens(record.line, "its field continues past the end of the row"))
        if record.closes_unopened or (record.has_inches and (is_short or before_is_short)):
            raise _Fault(_closes(record.line))
        before_is_short = is_short
        if record.has_inches:
            first_inches = first_inches or record.line
        if record.spans_lines:
            n_broken += 1
            if _holds_rows(record, dialect, n_columns):
                n_swallowing += 1
                first_swallowing = first_swallowing or record.line
        elif not record.has_inches:
            quoting[record.n_quoted == len(row)] += 1
        n_rows += 1
        n_fitting += not is_short
    if first_inches and quoting[True] and not quoting[False]:
        raise _Fault(_closes(first_inches))  # every other field is quoted, so this quote closes one
    # Fields of several lines are normal in some files, and some of those lines contain a comma. They are rows if all
    # such fields look like rows and other rows are not fully quoted.
    if n_swallowing and n_swallowing == n_broken and quoting[False]:
        raise _Fault(_opens(first_swallowing, "its field covers lines that each read as a row"))
    return header, n_fitting / max(n_rows, 1)


def _records(body: _Body, dialect: _Dialect) -> Iterator[_Record]:
    """Every row that is not blank. Raises _Fault if a quote closes in the middle of a field."""
    patterns, line, at = dialect.patterns(), body.line, 0
    chunks = body.chunks()
    text, is_all, wanted, skip = "", False, 1, body.start
    while True:
        found = None
        if at < len(text):
            try:
                found = _record(text, at, line, dialect, patterns)
            except _Unclosed:
                if is_all:
                    raise
        # What ends with the text so far may continue in the next part.
        if not is_all and (found is None or found[1] >= len(text)):
            parts, n_new = [text[at:]], 0
            while n_new < wanted:
                part = next(chunks, None)
                if part is None:
                    is_all = True
                    break
                n_new += len(part[skip:])
                parts.append(part[skip:])
                skip = max(0, skip - len(part))
            text, at = "".join(parts), 0
            wanted = 2 * len(text)  # a row longer than a part is read again as few times as possible
            continue
        if found is None:
            return
        record, end = found
        line += len(_LINE_END.findall(text, at, end))
        at, wanted = end, 1
        if record.source:
            yield record


def _record(text: str, start: int, line: int, dialect: _Dialect, pattern: _Patterns) -> tuple[_Record, int]:
    """The row at a position, and the position after its line end."""
    record, at = _Record(line), start
    while True:
        quoted = end = None
        if pattern.opening.match(text, at):
            quoted = pattern.quoted.match(text, at)
            end = pattern.end.match(text, quoted.end()) if quoted else None
            if end is None:
                _check_quote(text, quoted, dialect, line + len(_LINE_END.findall(text, start, at)))
        if quoted and end:
            value, at = quoted[1].replace(dialect.quote * 2, dialect.quote), end.end()
            record.n_quoted += 1
            record.spans_lines |= _LINE_END.search(quoted[1]) is not None
        else:
            plain = pattern.plain.match(text, at)
            assert plain is not None  # it may be empty
            value, at = plain[0], plain.end()
            bare = (re.sub(r"\\.", "", value, flags=re.DOTALL) if dialect.escape else value).rstrip()
            if bare.endswith(dialect.quote) and bare.count(dialect.quote) % 2:
                is_inches = _INCHES.search(bare) is not None
                record.has_inches |= is_inches
                record.closes_unopened |= not is_inches
        if dialect.escape:
            value = "" if value == r"\N" else re.sub(r"\\(.)", r"\1", value, flags=re.DOTALL)
        record.fields.append(value)
        if not (dialect.separator and text.startswith(dialect.separator, at)):
            break
        at += 1
    record.source = text[start:at]
    ended = _LINE_END.match(text, at)
    return record, ended.end() if ended else at


def _check_quote(text: str, quoted: re.Match[str] | None, dialect: _Dialect, line: int) -> None:
    """Raise _Fault for an opening quote that does not enclose its field, unless it is safe as a plain character."""
    if quoted is None:
        raise _Unclosed(_opens(line, "nothing closes it"))
    inside = quoted[1]
    if _LINE_END.search(inside):
        raise _Fault(_opens(line, "the next quote is in the middle of a later field"))
    if any(char and char in inside for char in (dialect.separator, dialect.quote)) or inside.endswith("\\"):
        after = text[quoted.end() : quoted.end() + 20].splitlines()[0]
        raise _Fault(
            f"line {line} has text after a closing quote ({after!r}); if the quotes are part of the text, double them "
            'and quote the field: "she said ""no"", twice"'
        )


def _opens(line: int, why: str) -> str:
    return (
        f"line {line} opens a quote, and {why}; close it, or if it is part of the text, double it and quote the field"
    )


def _closes(line: int) -> str:
    return (
        f"line {line} closes a quote that was not opened; add the opening quote at the start of the field, or remove "
        "the closing one"
    )


def _holds_rows(record: _Record, dialect: _Dialect, n_columns: int) -> bool:
    """Whether each line of a multi-line row would be a row with words in each field, if its quotes were ignored."""
    lines = _LINE_END.split(record.source)
    return (
        n_columns > 1
        and len(lines) >= MIN_SWALLOWED_LINES
        and all(
            line.count(dialect.separator) == n_columns - 1
            and all(_WORDS.search(part) for part in line.split(dialect.separator))
            and any(len(_WORDS.findall(part)) >= 3 for part in line.split(dialect.separator))
            for line in lines
        )
    )
