"""Keeps one copy of each conversation, and says why another is not needed.

A copy is equal but for spaces, case and punctuation. Of an exchange, the answer decides: it belongs to one question.
"""

import hashlib
from array import array
from collections.abc import Sequence

from counsel.chat import conversation
from train.cleaning import normalized
from train.spool import Row, Spool


class Copies:
    """Keeps one copy of each conversation, in little memory: hashes, and the rows in a Spool."""

    def __init__(self) -> None:
        self._candidates = Spool()
        self._kept: dict[bytes, int] = {}  # by what makes a copy: the index of the first one below
        self._question: list[bytes] = []
        self._exact: list[bytes] = []
        self._best = array("q")  # the candidate with the longest text
        self._length = array("q")
        self._topics: dict[int, str] = {}  # where the first copy has none
        self._other_copies: set[bytes] = set()
        self._longest_question: dict[bytes, tuple[int, int]] = {}  # its length, and a candidate that has it

    def add(self, row: Row, said: Sequence[str]) -> str | None:
        """Keep a row, or return why it is not needed. said: the turns of user and assistant."""
        question, exact = _digest(row["question_id"]), _digest("\0".join(said))
        # An answer belongs to one question; of longer conversations, the whole counts.
        key = _digest(normalized(said[1]) if len(said) == 2 else "\0".join(map(normalized, said)))
        length = len(said[1]) if len(said) == 2 else sum(map(len, said))
        at = self._kept.get(key)
        if at is not None and self._question[at] != question:
            return "answer given to another question"
        best = None
        if at is None:
            self._kept[key] = len(self._question)
            self._question.append(question)
            self._exact.append(exact)
            best = len(self._candidates)
            self._best.append(best)
            self._length.append(length)
        elif length > self._length[at]:
            best = len(self._candidates)
            self._best[at], self._length[at] = best, length
        if at is not None and row["topic"]:
            self._topics.setdefault(at, row["topic"])
        longest = self._longest_question.get(question, (-1, -1))
        if len(said) == 2 and len(said[0]) > longest[0]:
            best = len(self._candidates)
            self._longest_question[question] = (len(said[0]), best)
        if best is not None:
            self._candidates.append(row)
        if at is None:
            return None
        is_exact = exact == self._exact[at] or exact in self._other_copies
        self._other_copies.add(exact)
        return "duplicate" if is_exact else "duplicate but for spaces, case, punctuation"

    def rows(self) -> Spool:
        """One row per conversation, in the order of their first copies."""
        rows = Spool()
        for at, best in enumerate(self._best):
            row = self._candidates[best]
            row["topic"] = row["topic"] or self._topics.get(at, "")
            longest = self._longest_question.get(self._question[at])
            if longest and sum(message["role"] != "system" for message in conversation(row)) == 2:
                row["question"] = self._candidates[longest[1]]["question"]
                if "messages" in row:
                    row["messages"][-2]["content"] = row["question"]
            rows.append(row)
        return rows


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=16).digest()
