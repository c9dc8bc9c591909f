"""Finds the columns that a config names in those that a file has."""

from collections.abc import Sequence

from counsel.errors import UserError
from train.shapes import folded


def matching(wanted: str, present: Sequence[str], data: str) -> str | None:
    """The column of that name; failing that, one that differs in case and outer spaces only. None without one.

    Raises UserError if there are several.
    """
    matches = [column for column in present if column == wanted]
    matches = matches or [column for column in present if folded(column) == folded(wanted)]
    if len(matches) > 1:
        names = " and ".join(map(repr, matches))
        raise UserError(f"{data!r} has {len(matches)} columns with the same name, {names}; rename or remove one")
    return matches[0] if matches else None


def required(option: str, wanted: str, present: Sequence[str], data: str, example: str) -> str:
    """Like `matching`. Raises UserError, which names the option, if there is no such column.

    example: a header, for a file that has none.
    """
    found = matching(wanted, present, data)
    if found is not None:
        return found
    shown = [column if len(column) <= 40 else f"{column[:40]}..." for column in present]
    if any(len(column) > 60 or "\n" in column for column in present):
        raise UserError(
            f"{data!r} has no header row: its first line contains {shown[0]!r}; add a first line with the column "
            f"names, such as {example}"
        )
    listed = ", ".join(map(repr, shown[:12])) + (f" and {len(shown) - 12} more" if len(shown) > 12 else "")
    raise UserError(f"{data!r} has no column {wanted!r}, only {listed}; name the right one with --{option}")
