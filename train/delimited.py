"""Tables in text, as CSV and its kin: the separator and the quoting are found, and a stray quote is refused.

Python's own reader, and pandas', take a quote that opens a field and has no partner as the start of a text of many
lines: the rows behind it vanish without a word. Here every quoted field must end where a field may end.

    table = read(text, "talks.csv")
    table.header, table.rows, table.said        # ["q", "a"], [["why?", "well"]], "';' between fields"
"""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from counsel.errors import UserError

_SEPARATORS = {",": "comma", ";": "semicolon", "\t": "tab", "|": "bar"}
# Excel's own hint, in the first line.
_SEPARATOR_LINE = re.compile(r'"?sep=([^\r\n])"?[ \t]*(?:\r\n|\r|\n|\Z)', re.IGNORECASE)
_LINE_END = re.compile(r"\r\n|\r|\n")
_INCHES = re.compile(r"[\d'\u2019]\s*\"$")
_WORDS = re.compile(r"[^\W\d_]{2,}")
# Of a field that spans lines: so many lines that each read as a row are taken for rows.
MIN_SWALLOWED_LINES = 3
# Where one separator leads to a fault, so many rows must be as long as the header for another one to be the right one.
MIN_FITTING_SHARE = 0.9


class Table(NamedTuple):
    """A header, rows of as many fields or fewer, and how they were told apart, in words."""

    header: list[str]
    rows: list[list[str]]
    said: str


class _Fault(Exception):
    """What is wrong, with its line."""


@dataclass(frozen=True)
class _Dialect:
    """separator: empty in a table of one column. quote: one character. escape: a backslash, or empty.

    references: the semicolon of &#128546; ends no field. Excel writes so what Windows-1252 lacks, without quotes.
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
    """A field's opening quote, a quoted field, any other field, and the place where a field may end."""

    opening: re.Pattern[str]
    quoted: re.Pattern[str]
    plain: re.Pattern[str]
    end: re.Pattern[str]


@dataclass
class _Record:
    """One row: its first line, its fields, and its source, which lines it spans and how it was quoted."""

    line: int
    source: str = ""
    fields: list[str] = field(default_factory=list)
    n_quoted: int = 0
    spans_lines: bool = False
    closes_unopened: bool = False
    has_inches: bool = False


def read(text: str, name: str) -> Table:
    """The table in `text`. Raises UserError, naming the line, for a quote or a separator that stands astray."""
    line, hint = 1, _SEPARATOR_LINE.match(text)
    if hint:
        text, line = text[hint.end() :], 2
    blank = re.match(r"(?:[ \t]*(?:\r\n|\r|\n))*", text)
    assert blank is not None
    text, line = text[blank.end() :], line + len(_LINE_END.findall(blank[0]))
    faults: list[_Fault] = []
    kinds: list[dict[str, Any]] = [{}, *([{"references": True}] if "&" in text else []), {"escape": "\\"}]
    for kind in kinds:
        found: list[tuple[float, int, Table]] = []
        for dialect in _candidates(text, hint[1] if hint else "", kind):
            try:
                header, rows = _read(text, dialect, line)
            except _Fault as fault:
                faults.append(fault)
                continue
            fitting = sum(len(row) == len(header) for row in rows) / max(len(rows), 1)
            said = f"{dialect}{', as its sep= line says' if hint else ''}"
            found.append((fitting, len(header), Table(header, rows, said)))
        fitting, _, table = max(found, key=lambda scored: scored[:2], default=(0.0, 0, None))
        # What reads without a fault because it is cut at the wrong character has rows of all lengths.
        if table and (not faults or fitting >= MIN_FITTING_SHARE):
            return table
    raise UserError(f"{name!r} {faults[0]}")


def _candidates(text: str, hint: str, kind: dict[str, Any]) -> list[_Dialect]:
    """The ways in which the header can be read, most columns first; a hint leaves one."""
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
            held = "commas" if dialect.separator == "," else f"the separator {dialect.separator!r}"
            raise _Fault(f"line {record.line} has more fields than the header; quote the fields that hold {held}")
        is_short = len(row) < n_columns
        if is_short and record.spans_lines and dialect.separator in record.source:
            raise _Fault(_opens(record.line, "its field runs on over the ends of rows"))
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
        raise _Fault(_closes(inches[0].line))  # where every other field is quoted, this one was
    swallowing = [record for record in broken if _holds_rows(record, dialect, n_columns)]
    # Texts of several lines are usual in some files, and some have a comma in each line. Where all that span lines look
    # like rows, and others are not quoted throughout, it is rows.
    if swallowing and len(swallowing) == len(broken) and quoting[False]:
        raise _Fault(_opens(swallowing[0].line, "its field runs on over lines that each read as a row"))
    return head.fields, rows


def _records(text: str, dialect: _Dialect, line: int) -> Iterator[_Record]:
    """Every row that is not blank. Raises _Fault where a quoted field ends in the middle of one."""
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
    """Raise _Fault for a quote that opens a field and does not end it, unless no field ends elsewhere without it."""
    if quoted is None:
        raise _Fault(_opens(line, "nothing closes it"))
    inside = quoted[1]
    if _LINE_END.search(inside):
        raise _Fault(_opens(line, "what closes it stands in the middle of a later field"))
    if any(char and char in inside for char in (dialect.separator, dialect.quote)) or inside.endswith("\\"):
        behind = text[quoted.end() : quoted.end() + 20].splitlines()[0]
        raise _Fault(
            f"line {line} has text behind a closing quote ({behind!r}); where quotes are part of a text, double them "
            'and quote the field: "she said ""no"", twice"'
        )


def _opens(line: int, why: str) -> str:
    return (
        f"line {line} opens a quote, and {why}; close it, or where it is part of a text double it and quote the field"
    )


def _closes(line: int) -> str:
    return (
        f"line {line} closes a quote that nothing opens; put the opening quote where the field begins, or remove the "
        "closing one"
    )


def _holds_rows(record: _Record, dialect: _Dialect, n_columns: int) -> bool:
    """Is each line of a row that spans lines a row by itself, with words in each field, if its quotes are no quotes?"""
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
