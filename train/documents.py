"""Reads rows from JSON in the shapes that people have: JSON Lines, a list, a list under a key, pandas tables.

rows, shape = read_documents(text, "talks.json")  # [{"q": "why?", "a": "well"}], "JSON, a list of objects under a key"
"""

import json
from collections.abc import Iterable, Iterator
from typing import Any

from counsel.errors import UserError
from train.shapes import is_conversation

Objects = list[dict[str, Any]]

_SHAPES = 'one object per line, a list of objects, {"data": [objects]}, or {"column": [values]}'


def read_documents(text: str, name: str) -> tuple[Objects, str]:
    """The rows of JSON or JSON Lines, and a description of the shape. Raises UserError that names the line or shape."""
    if not text.strip():
        return [], "JSON Lines"
    first_line = text.strip().split("\n", 1)[0]
    try:
        if text.lstrip()[0] != "{":
            return _rows(_parse(text), name)
        try:
            one = _parse(first_line)
        except json.JSONDecodeError:
            return _rows(_parse(text), name)  # one object over several lines
    except json.JSONDecodeError as error:
        if text.lstrip()[0] in "{[":
            raise UserError(f"{name!r} line {error.lineno} is not JSON: {error.msg}") from error
        raise UserError(
            f"{name!r} is not JSON: it starts with {first_line[:20]!r}; it must contain {_SHAPES}"
        ) from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{name!r} is not JSON: {error}") from error
    if text.strip() == first_line:
        return _rows(one, name)
    return list(read_lines([text], name)), "JSON Lines"


def is_json_lines(chunks: Iterable[str]) -> bool:
    """Whether a text, given in parts, has a JSON object in its first line and more after it."""
    filled = (line for line in _lines(chunks) if line.strip())
    first = next(filled, "")
    try:
        return first.lstrip().startswith("{") and isinstance(_parse(first), dict) and next(filled, "") != ""
    except (ValueError, RecursionError):
        return False


def read_lines(chunks: Iterable[str], name: str) -> Iterator[dict[str, Any]]:
    """The objects of JSON Lines, given in parts. Raises UserError that names the line."""
    for number, line in enumerate(_lines(chunks), start=1):
        if not line.strip():
            continue
        try:
            row = _parse(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{name!r} line {number} is not JSON: {error.msg} (column {error.colno})") from error
        except (ValueError, RecursionError) as error:
            raise UserError(f"{name!r} line {number} is not JSON: {error}") from error
        if not isinstance(row, dict):
            raise UserError(f"{name!r} line {number} is a JSON {type(row).__name__}; it must be an object")
        yield row


def _lines(chunks: Iterable[str]) -> Iterator[str]:
    """Lines without their ends. Not splitlines(): it also breaks at U+2028 and U+0085, which JSON strings may hold."""
    parts: list[str] = []
    for chunk in chunks:
        first, *more = chunk.split("\n")
        parts.append(first)
        if more:
            yield "".join(parts)
            yield from more[:-1]
            parts = [more[-1]]
    yield "".join(parts)


def _rows(document: Any, name: str) -> tuple[Objects, str]:
    """The rows of one JSON value, and a description of its shape."""
    if _all_objects(document):
        return document, "JSON, a list of objects"
    if isinstance(document, dict) and document:
        lists = {key: value for key, value in document.items() if _all_objects(value) and value}
        if any(map(is_conversation, lists.values())):
            return [document], "JSON, one object"  # one conversation
        if len(lists) == 1:
            return next(iter(lists.values())), f"JSON, a list of objects under {next(iter(lists))!r}"
        if len(lists) > 1:
            raise UserError(f"{name!r} contains lists of objects under {', '.join(map(repr, lists))}; keep one of them")
        columns, cells = document.get("columns"), document.get("data")
        if isinstance(columns, list) and isinstance(cells, list) and _all_of_length(cells, len(columns)):
            return [dict(zip(map(str, columns), row, strict=True)) for row in cells], "JSON, pandas' split table"
        values = list(document.values())
        if all(isinstance(value, dict) for value in values):
            if all(key.isdigit() for key in document):
                return values, "JSON, pandas' table by index"
            if all(value.keys() == values[0].keys() for value in values):
                keys = list(values[0])
                return [{c: document[c][key] for c in document} for key in keys], "JSON, pandas' table by column"
        if _all_of_length(values, len(values[0]) if isinstance(values[0], list) else -1):
            return [
                dict(zip(document, row, strict=True)) for row in zip(*values, strict=True)
            ], "JSON, a list by column"
        if not all(isinstance(value, dict | list) for value in values):
            return [document], "JSON, one object"
        shape = f"an object with {', '.join(repr(key) for key in list(document)[:5])}"
    else:
        shape = f"a {type(document).__name__} that is not a list of objects"
    raise UserError(f"{name!r} contains {shape}; it must contain {_SHAPES}")


def _all_objects(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, dict) for item in value)


def _all_of_length(values: list[Any], length: int) -> bool:
    return all(isinstance(value, list) and len(value) == length for value in values)


def _parse(text: str) -> Any:
    return json.loads(text, object_pairs_hook=_unique_keys)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object. Raises ValueError for a repeated key, because the intended value is unknown."""
    values = dict(pairs)
    if len(values) < len(pairs):
        repeated = next(key for n, (key, _) in enumerate(pairs) if key in dict(pairs[:n]))
        raise ValueError(f"the key {repeated!r} is given twice in one object")
    return values
