"""Tables as text: aligned columns for a terminal, pipes for Markdown. The first row is the heading."""

from collections.abc import Sequence


def text_table(rows: Sequence[Sequence[str]], numbers_from: int | None = None) -> str:
    """Aligned columns, two spaces apart. `numbers_from`: the first column that is aligned to the right."""
    from tabulate import tabulate

    columns = len(rows[0])
    left = columns if numbers_from is None else numbers_from
    sides = ("left",) * left + ("right",) * (columns - left)
    return str(tabulate(rows, tablefmt="plain", disable_numparse=True, colalign=sides))


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """A pipe table, as GitHub and most Markdown readers take it."""
    from tabulate import tabulate

    return str(tabulate(rows[1:], rows[0], tablefmt="github", disable_numparse=True))
