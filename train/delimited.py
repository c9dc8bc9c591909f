"""Reads CSV and similar tables: detects the separator and the quoting, and rejects a stray quote.

Python's and pandas' readers take an opening quote without a partner as the start of a field of many lines, and silently
lose the rows after it. Here every quoted field must end where a field can end.

    table = read_table(text, "talks.csv")
    table.header, table.rows, table.format        # ["q", "a"], [["why?", "well"]], "semicolon between fields"
"""

import re
from collections import Counter
from collections.abc import Iterator
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


class Table(NamedTuple):
    """A header, rows with at most as many fields, and a description of the separator and quoting."""

    header: list[str]
    rows: list[list[str]]
    format: str


class _Fault(Exception):
    """A malformed line: what is wrong, and where."""


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
    line, hint = 1, _SEPARATOR_LINE.match(text)
    if hint:
        text, line = text[hint.end() :], 2
    blank = re.match(r"(?:[ \t]*(?:\r\n|\r|\n))*", text)
    assert blank is not None
    text, line = text[blank.end() :], line + len(_LINE_END.findall(blank[0]))
    faults: list[_Fault] = []
    kinds: list[dict[str, Any]] = [{}, *([{"references": True}] if "&" in text else []), {"escape": "\\"}]
    for kind in kinds:
        readings: list[tuple[float, int, Table]] = []
        for dialect in _candidates(text, hint[1] if hint else "", kind):
            try:
                header, rows = _read(text, dialect, line)
            except _Fault as fault:
                faults.append(fault)
                continue
            fitting = sum(len(row) == len(header) for row in rows) / max(len(rows), 1)
            described = f"{dialect}{', as its sep= line says' if hint else ''}"
            readings.append((fitting, len(header), Table(header, rows, described)))
        fitting, _, table = max(readings, key=lambda scored: scored[:2], default=(0.0, 0, None))
        # A table cut at the wrong character may read without a fault, but its rows differ in length.
        if table and (not faults or fitting >= MIN_FITTING_SHARE):
            return table
    raise UserError(f"{name!r} {faults[0]}")


def _candidates(text: str, hint: str, kind: dict[str, Any]) -> list[_Dialect]:
    """The dialects in which the header can be read, most columns first. A hint leaves one."""
    quote = "'" if re.match(r"'[^'\r\n]*'([^'\r\n])'[^'\r\n]*'(?:\1'[^'\r\n]*')*[ ]*(?:[\r\n]|\Z)", text) else '"'
    if hint:
        return [_Dialect(hint, quote, **kind)]
    columns = {}
    for separator in _SEPARATORS:
        dialect = _Dialect(separator, quote, **kind)
        try:
            columns[dialect] = len(next(_records(text, dialect, 1), _Record(1)).fields)
        except _Fault:
            columns[dialect] = text.count(separator, 0, 10_000) + 1
    several = [dialect for dialect, n in columns.items() if n > 1]
    return sorted(several, key=lambda dialect: -columns[dialect]) or [_Dialect("", quote, **kind)]


def _read(text: str, dialect: _Dialect, first_line: int) -> tuple[list[str], list[list[str]]]:
    records = _records(text, dialect, first_line)
    head = next(records, None)
    if head is None:
        return [], []
    while head.fields and not head.fields[-1].strip():
        head.fields.pop()
    n_columns = len(head.fields)
    rows, broken = [], []
    inches: list[_Record] = []
    quoting: Counter[bool] = Counter()
    before_is_short = False
    for record in records:
        row = record.fields
        while len(row) > n_columns and not row[-1].strip():
            row.pop()
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
            inches.append(record)
        if record.spans_lines:
            broken.append(record)
        elif not record.has_inches:
            quoting[record.n_quoted == len(row)] += 1
        rows.append(row)
    if inches and quoting[True] and not quoting[False]:
        raise _Fault(_closes(inches[0].line))  # every other field is quoted, so this quote closes one
    swallowing = [record for record in broken if _holds_rows(record, dialect, n_columns)]
    # Fields of several lines are normal in some files, and some of those lines contain a comma. They are rows if all
    # such fields look like rows and other rows are not fully quoted.
    if swallowing and len(swallowing) == len(broken) and quoting[False]:
        raise _Fault(_opens(swallowing[0].line, "its field covers lines that each read as a row"))
    return head.fields, rows


def _records(text: str, dialect: _Dialect, line: int) -> Iterator[_Record]:
    """Every row that is not blank. Raises _Fault if a quote closes in the middle of a field."""
    pattern, at = dialect.patterns(), 0
    while at < len(text):
        record, start = _Record(line), at
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
        at = ended.end() if ended else at
        line += len(_LINE_END.findall(text, start, at))
        if record.source:
            yield record


def _check_quote(text: str, quoted: re.Match[str] | None, dialect: _Dialect, line: int) -> None:
    """Raise _Fault for an opening quote that does not enclose its field, unless it is safe as a plain character."""
    if quoted is None:
        raise _Fault(_opens(line, "nothing closes it"))
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
