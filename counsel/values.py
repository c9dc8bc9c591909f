"""What a field of a config dataclass may hold: text or YAML in, a checked value out.

A field is str, int, float, bool, `Literal[...]`, `tuple[T, ...]` or `T | None`; bounds are `Annotated[int, Ge(1)]`, and
so are choices, `Annotated[int, Literal[8, 16]]`, where code passes a value that type checkers know only as an int.
pydantic reads the same annotations, but its import takes longer than all else that `--help` needs, and its errors would
have to be reworded: here each error is one line with the key, the value and what is allowed.
"""

import dataclasses
import datetime
import difflib
import math
import operator
import types
import typing
import urllib.parse
from collections.abc import Iterable
from typing import Annotated, Any, NamedTuple

from annotated_types import Ge, Gt, Le, Lt

from counsel.errors import UserError

BASE_URL = "http://127.0.0.1:8000/v1"

PositiveInt = Annotated[int, Ge(1)]
NonNegativeInt = Annotated[int, Ge(0)]
PositiveFloat = Annotated[float, Gt(0)]
NonNegativeFloat = Annotated[float, Ge(0)]
Share = Annotated[float, Ge(0), Le(1)]
ShareBelowOne = Annotated[float, Ge(0), Lt(1)]
Seed = Annotated[int, Ge(0), Le(2**32 - 1)]

_TRUE, _FALSE = {"true", "yes", "on", "1"}, {"false", "no", "off", "0"}
_TESTS = {"ge": operator.ge, "gt": operator.gt, "le": operator.le, "lt": operator.lt}
_UNITS = {"_s": "SECONDS", "_gb": "GB", "_kb": "KIB", "_share": "SHARE"}


class Kind(NamedTuple):
    """A field's annotation, taken apart. With `many`, the type, choices and bounds are those of each item.

    bounds: pairs such as ("ge", 1).
    """

    type: type
    choices: tuple[Any, ...] = ()
    bounds: tuple[tuple[str, float], ...] = ()
    many: bool = False
    optional: bool = False


def kinds(schema: type) -> dict[str, Kind]:
    """The kind of each field of a config dataclass."""
    hints = typing.get_type_hints(schema, include_extras=True)
    return {field.name: _kind(hints[field.name]) for field in dataclasses.fields(schema)}


def _kind(hint: Any) -> Kind:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        kind = _kind(arguments[0])
        choices = [choice for extra in arguments[1:] for choice in typing.get_args(extra)]
        bounds = [(name, getattr(extra, name)) for extra in arguments[1:] for name in _TESTS if hasattr(extra, name)]
        return kind._replace(choices=(*kind.choices, *choices), bounds=(*kind.bounds, *bounds))
    if origin in (types.UnionType, typing.Union):
        return _kind(next(arm for arm in arguments if arm is not types.NoneType))._replace(optional=True)
    if origin is tuple:
        return _kind(arguments[0])._replace(many=True)
    if origin is typing.Literal:
        return Kind(type(arguments[0]), choices=arguments)
    return Kind(hint)


def bounds_text(kind: Kind) -> str:
    """`at least 1`, `from 0 to 1`, `at least 0 and below 1`; empty without bounds."""
    bounds = dict(kind.bounds)
    low = bounds.get("ge", bounds.get("gt"))
    high = bounds.get("le", bounds.get("lt"))
    if "ge" in bounds and "le" in bounds:
        return f"from {low} to {high}"
    if "ge" in bounds and low == 0 and high is None:
        return "0 or more"
    parts = [] if low is None else [f"at least {low}" if "ge" in bounds else f"above {low}"]
    parts += [] if high is None else [f"at most {high}" if "le" in bounds else f"below {high}"]
    return " and ".join(parts)


def metavar(name: str, kind: Kind) -> str:
    """What `--help` shows for a value: its choices, or its type with the unit that the field's name ends in."""
    unit = next((unit for suffix, unit in _UNITS.items() if name.endswith(suffix)), "X")
    one = f"{{{','.join(map(str, kind.choices))}}}" if kind.choices else {int: "N", float: unit}.get(kind.type, "TEXT")
    return f"{one},..." if kind.many else one


def check_bounds(config: Any) -> None:
    """Raise UserError for a field of a config dataclass that is outside its bounds or not one of its choices.

    For `__post_init__`: configs made in code obey the same rules as flags and YAML.
    """
    for name, kind in kinds(type(config)).items():
        value = getattr(config, name)
        if value is None and kind.optional:
            continue
        for item in value if kind.many else (value,):
            _check(name, item, kind)


def _check(key: str, value: Any, kind: Kind) -> None:
    if kind.choices and value not in kind.choices:
        close = difflib.get_close_matches(str(value), list(map(str, kind.choices)), n=1, cutoff=0.6)
        advice = f" (did you mean {close[0]!r}?)" if close and kind.type is str else ""
        raise UserError(f"{key} is {value!r}; allowed: {', '.join(map(str, kind.choices))}{advice}")
    if kind.type not in (int, float):
        return
    if not math.isfinite(value) or not all(_TESTS[name](value, bound) for name, bound in kind.bounds):
        wanted = bounds_text(kind) or "a finite number"
        raise UserError(f"{key} is {value}; it must be {wanted}{' (or none)' if kind.optional else ''}")


def convert(key: str, value: Any, kind: Kind) -> Any:
    """A flag's text or a YAML value as the type of its field. Raises UserError for what the field cannot hold."""
    if kind.optional and (value is None or value == "none"):
        return None
    if kind.many:
        parts = value.split(",") if isinstance(value, str) else value if isinstance(value, list | tuple) else [value]
        return tuple(_convert(key, part, kind) for part in parts)
    return _convert(key, value, kind)


def _convert(key: str, value: Any, kind: Kind) -> Any:
    try:
        converted = _as_type(value, kind.type)
    except (TypeError, ValueError, OverflowError) as error:
        if kind.choices:
            raise UserError(f"{key} is {value!r}; allowed: {', '.join(map(str, kind.choices))}") from error
        wanted = {int: "a whole number", float: "a finite number", bool: "true or false", str: "text"}[kind.type]
        wanted += ", not a list" if isinstance(value, list) else ""
        given = "empty (null)" if value is None else repr(value)
        is_scalar = isinstance(value, int | float | datetime.date)
        advice = "; in YAML put it in quotes" if kind.type is str and is_scalar else ""
        raise UserError(f"{key} is {given}; it must be {wanted}{advice}") from error
    _check(key, converted, kind)
    return converted


def _as_type(value: Any, wanted: type) -> Any:
    """Raises TypeError, ValueError or OverflowError for a value of another type."""
    if wanted is bool:
        word = str(value).lower()
        if word not in _TRUE | _FALSE:
            raise ValueError
        return word in _TRUE
    if wanted is str:
        if not isinstance(value, str):
            raise TypeError  # YAML may have read a number, a date or a list out of what was meant as text
        value.encode("utf-8")  # an unpaired surrogate, or bytes in another encoding, would fail later
        return value
    if isinstance(value, bool) or not math.isfinite(number := float(value)):
        raise ValueError
    if wanted is int and number != int(number):
        raise ValueError
    return int(value if isinstance(value, int) else number) if wanted is int else number


def nearest(word: str, allowed: Iterable[str]) -> str:
    """Say which allowed word `word` may have meant, or list them all."""
    known = list(allowed)
    close = difflib.get_close_matches(word, known, n=3, cutoff=0.6)
    return f"did you mean {' or '.join(map(repr, close))}?" if close else f"known: {', '.join(sorted(known))}"


def checked_url(url: str) -> str:
    """`url`, if a client can call it; raises UserError otherwise."""
    try:
        parts = urllib.parse.urlsplit(url)
        callable_url = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        callable_url = False
    if not callable_url:
        raise UserError(f"url is {url!r}; it must be like {BASE_URL}")
    return url
