"""Reads the values of scenario options such as `4`, `ramp(1, 10)`, `lognormal(64, 0.5)`, `weights(gentle=3, base=1)`.

A value is a number, or one call of a known name with numbers, by position or by keyword.
"""

import re
from collections.abc import Mapping
from typing import NamedTuple

from counsel.errors import UserError
from counsel.values import nearest

_CALL = re.compile(r"\s*([a-z_]+)\s*(?:\((.*)\))?\s*", re.DOTALL)


class Call(NamedTuple):
    """A parsed value: its name, its positional numbers, its keyword numbers."""

    name: str
    numbers: tuple[float, ...]
    named: Mapping[str, float]


def parse(option: str, text: str, known: Mapping[str, str]) -> Call:
    """Read `text`, the value of `option`; `known` maps each allowed name to its form.

    A number alone has the name "". Raises UserError that lists the allowed forms.
    """
    bare = _number(text)
    if bare is not None and "" in known:
        return Call("", (bare,), {})
    match = _CALL.fullmatch(text)
    if match is None or match[1] not in known:
        word = match[1] if match else text
        forms = " | ".join(known.values())
        raise UserError(f"{option} is {text!r}; {nearest(word, [name for name in known if name])} (forms: {forms})")
    numbers, named = [], {}
    for part in filter(None, (part.strip() for part in (match[2] or "").split(","))):
        key, equals, value = part.rpartition("=")
        number = _number(value)
        if number is None:
            raise UserError(f"{option} is {text!r}; {value.strip()!r} is not a number (form: {known[match[1]]})")
        if equals:
            named[key.strip()] = number
        else:
            numbers.append(number)
    return Call(match[1], tuple(numbers), named)


def _number(text: str) -> float | None:
    """`text` as a finite number; None if it is not one."""
    try:
        value = float(text)
    except ValueError:
        return None
    return value if value - value == 0 else None
