"""Sequences of rows that need little memory: beyond 64 MB they lie in a temporary file.

rows = Spool([{"question": "why?"}]); rows.append({"question": "who?"}); len(rows), rows[1], Selection(rows, [1])
"""

import pickle
import tempfile
import weakref
from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, overload

# A larger spool moves to the folder for temporary files (TMPDIR).
MEMORY_BYTES = 64 << 20

Row = dict[str, Any]


class _Rows(Sequence[Row]):
    """What spools and selections share: slices, and equality with any sequence of the same rows."""

    def _row(self, index: int) -> Row:
        raise NotImplementedError

    @overload
    def __getitem__(self, index: int) -> Row: ...

    @overload
    def __getitem__(self, index: slice) -> list[Row]: ...

    def __getitem__(self, index: int | slice) -> Row | list[Row]:
        if isinstance(index, slice):
            return [self._row(at) for at in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        return self._row(index % len(self))

    def __iter__(self) -> Iterator[Row]:
        return map(self._row, range(len(self)))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence):
            return NotImplemented
        return len(self) == len(other) and all(mine == its for mine, its in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]  # it can grow, like a list


class Spool(_Rows):
    """Rows in order of appending. Each read gives a new copy, so changing a row that was read changes nothing here."""

    def __init__(self, rows: Iterable[Row] = ()) -> None:
        self._file = tempfile.SpooledTemporaryFile(MEMORY_BYTES)  # noqa: SIM115 (open for the life of the spool)
        weakref.finalize(self, self._file.close)
        self._starts = array("Q")
        self._end = 0
        for row in rows:
            self.append(row)

    def append(self, row: Row) -> None:
        content = pickle.dumps(row, pickle.HIGHEST_PROTOCOL)
        self._file.seek(self._end)
        self._file.write(content)
        self._starts.append(self._end)
        self._end += len(content)

    def __len__(self) -> int:
        return len(self._starts)

    def _row(self, index: int) -> Row:
        self._file.seek(self._starts[index])
        row: Row = pickle.load(self._file)
        return row


class Selection(_Rows):
    """The rows of another sequence at some of its indexes, without a copy."""

    def __init__(self, rows: Sequence[Row], indexes: Iterable[int]) -> None:
        self._rows = rows
        self.indexes = array("Q", indexes)

    def __len__(self) -> int:
        return len(self.indexes)

    def _row(self, index: int) -> Row:
        return self._rows[self.indexes[index]]
