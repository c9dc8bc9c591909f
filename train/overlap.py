"""Finds the user turns that conversations share, word for word or nearly, so that a split can keep them together.

A turn counts as shared from MIN_TURN_WORDS words on: short turns ("thank you so much") are common to strangers, and
would tie a whole data set together. Equal turns have equal letters and digits (train.cleaning.normalized). Near copies
share at least half of the five-word sequences that either has: candidates come from MinHash signatures (datasketch) and
are compared exactly.
"""

import hashlib
import re
import unicodedata
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from counsel.chat import conversation
from train.cleaning import count_words, normalized
from train.meter import Meter
from train.spool import Row

MIN_TURN_WORDS = 8
NEAR_JACCARD = 0.5
NGRAM_WORDS = 5
# 42 bands of 3 values: a pair at a similarity of 0.5 is compared with a probability of 99.6 %, at 0.6 of 99.997 %.
_BANDS, _BAND_VALUES = 42, 3
_BATCH = 1000
# Scripts without spaces: each letter counts as a word.
_WORD = re.compile("[\u3005-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff]|\\w+")


class DisjointSets:
    """Union-find over 0 .. n - 1."""

    def __init__(self, n: int) -> None:
        self._parents = array("q", range(n))

    def find(self, item: int) -> int:
        """The smallest item of the set of `item`."""
        root = item
        while self._parents[root] != root:
            root = self._parents[root]
        while self._parents[item] != root:
            self._parents[item], item = root, self._parents[item]
        return root

    def union(self, one: int, other: int) -> None:
        one, other = self.find(one), self.find(other)
        self._parents[max(one, other)] = min(one, other)


class SharedTurns(NamedTuple):
    """Which long user turns each row has. Both lists have one entry per row.

    exact: numbers of distinct turns. near: numbers of the groups of near copies that these turns are in.
    """

    exact: "list[array[int]]"
    near: "list[array[int]]"

    def between(self, some: Sequence[int], others: Sequence[int]) -> Counter[str]:
        """How many of the rows `some` share a turn with one of the rows `others`: `exact`, and else `near`."""
        turns = {turn for row in others for turn in self.exact[row]}
        groups = {group for row in others for group in self.near[row]}
        counts = Counter({"exact": 0, "near": 0})
        for row in some:
            if not turns.isdisjoint(self.exact[row]):
                counts["exact"] += 1
            elif not groups.isdisjoint(self.near[row]):
                counts["near"] += 1
        return counts

    def within(self, rows: Sequence[int]) -> Counter[str]:
        """How many of `rows` share a turn with any other row: `exact`, and else `near`."""
        turns = Counter(turn for found in self.exact for turn in set(found))
        groups = Counter(group for found in self.near for group in set(found))
        counts = Counter({"exact": 0, "near": 0})
        for row in rows:
            if any(turns[turn] > 1 for turn in self.exact[row]):
                counts["exact"] += 1
            elif any(groups[group] > 1 for group in self.near[row]):
                counts["near"] += 1
        return counts


class _Places(NamedTuple):
    """The row and the turn where each distinct turn was first seen."""

    rows: "array[int]"
    turns: "array[int]"


def shared_turns(rows: Sequence[Row]) -> SharedTurns:
    """The long user turns of each row, and which of them are near copies of each other."""
    exact: list[array[int]] = []
    numbers: dict[bytes, int] = {}
    places = _Places(array("q"), array("q"))
    bands = bytearray()
    batch: list[list[bytes]] = []
    meter = Meter("comparing user turns", len(rows), "rows")
    for at, row in enumerate(rows):
        turns = array("q")
        for turn, text in enumerate(user_turns(row)):
            if count_words(text) < MIN_TURN_WORDS:
                continue
            key = hashlib.blake2b(normalized(text).encode(), digest_size=16).digest()
            if key not in numbers:
                numbers[key] = len(numbers)
                places.rows.append(at)
                places.turns.append(turn)
                batch.append([gram.encode() for gram in sorted(_ngrams(text))])
            turns.append(numbers[key])
        exact.append(turns)
        if len(batch) >= _BATCH:
            bands += _band_hashes(batch)
            batch = []
        meter.at(at)
    meter.done()
    if batch:
        bands += _band_hashes(batch)
    del numbers  # the largest of these
    groups = DisjointSets(len(places.rows))
    if bands:
        _join_near_copies(bands, rows, places, groups)
    return SharedTurns(exact, [array("q", map(groups.find, turns)) for turns in exact])


def grouped(rows: Sequence[Row], shared: SharedTurns) -> list[str]:
    """For each row, the name of its group: rows that share a question or a group of near copies are in one group.

    The name is the smallest question_id of the group, so a row alone in its group has its own.
    """
    sets = DisjointSets(len(rows))
    first: dict[str | int, int] = {}
    ids = [row["question_id"] for row in rows]
    for at, (question, groups) in enumerate(zip(ids, shared.near, strict=True)):
        for key in (question, *groups):
            sets.union(first.setdefault(key, at), at)
    names: dict[int, str] = {}
    for at, question in enumerate(ids):
        root = sets.find(at)
        names[root] = min(names.get(root, question), question)
    return [names[sets.find(at)] for at in range(len(rows))]


def user_turns(row: Row) -> list[str]:
    return [message["content"] for message in conversation(row) if message["role"] == "user"]


def opening(turns: Sequence[str]) -> str:
    """The user turns up to the first long one, which tell what a conversation is about; all if none is long."""
    for n, turn in enumerate(turns, start=1):
        if count_words(turn) >= MIN_TURN_WORDS:
            return "\n".join(turns[:n])
    return "\n".join(turns)


def _ngrams(text: str) -> set[str]:
    words = _WORD.findall(unicodedata.normalize("NFKC", text).casefold())
    return {" ".join(words[at : at + NGRAM_WORDS]) for at in range(max(1, len(words) - NGRAM_WORDS + 1))}


def _band_hashes(texts: list[list[bytes]]) -> bytes:
    """One 32-bit hash per text and band of its MinHash signature, text after text."""
    import numpy as np
    from datasketch import MinHash

    signatures = np.stack([
        minhash.hashvalues for minhash in MinHash.bulk(texts, num_perm=_BANDS * _BAND_VALUES, seed=1)
    ]).astype(np.uint64).reshape(len(texts), _BANDS, _BAND_VALUES)  # fmt: skip
    mixed = np.zeros(signatures.shape[:2], np.uint64)
    for value in range(_BAND_VALUES):
        # FNV-1a's step, on whole values; different turns that collide are told apart by the exact comparison.
        mixed = (mixed ^ signatures[:, :, value]) * np.uint64(0x100000001B3)
    return (mixed ^ (mixed >> np.uint64(32))).astype(np.uint32).tobytes()


def _join_near_copies(bands: bytearray, rows: Sequence[Row], places: _Places, groups: DisjointSets) -> None:
    """Put near copies in one group. bands: what `_band_hashes` gave."""
    import numpy as np

    hashes = np.frombuffer(bands, np.uint32).reshape(-1, _BANDS)
    meter = Meter("comparing near copies", _BANDS, "bands")
    for band in range(_BANDS):
        for bucket in _buckets(hashes[:, band]):
            heads: dict[int, set[str]] = {}  # one turn of each group in this bucket, and its sequences of words
            for turn in bucket:
                if groups.find(turn) in {groups.find(head) for head in heads}:
                    continue
                ngrams = _ngrams(user_turns(rows[places.rows[turn]])[places.turns[turn]])
                for head, others in heads.items():
                    if len(ngrams & others) >= NEAR_JACCARD * len(ngrams | others):
                        groups.union(head, turn)
                heads[turn] = ngrams
        meter.at(band)
    meter.done()


def _buckets(hashes: Any) -> Iterator[list[int]]:
    """The turns of each hash that several turns have, in order."""
    import numpy as np

    order = np.argsort(hashes, kind="stable")
    ends = np.flatnonzero(np.diff(hashes[order])) + 1
    for start, end in zip([0, *ends], [*ends, len(order)], strict=True):
        if end - start > 1:
            yield [int(turn) for turn in order[start:end]]
