"""Decodes a file's bytes to text: UTF-8, UTF-16, UTF-32, or Windows-1252 if the result looks right.

UTF-8 is decoded in chunks, so a file of any size needs little memory. Other encodings are decoded as a whole.

Only UTF-8 and files with a byte-order mark can be recognized with certainty. Windows-1252, Excel's encoding in Western
Europe and America, decodes nearly any bytes, so it is accepted only if the result looks like Western text. Old
encodings of Cyrillic, Greek, Polish, Chinese and others would silently become wrong letters, so they are rejected.
"""

import codecs
import re
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

from counsel.errors import UserError

_MARKS = (
    (codecs.BOM_UTF8, "utf-8", "UTF-8 with a byte-order mark"),
    # Before UTF-16, because its mark starts with UTF-16's.
    (codecs.BOM_UTF32_LE, "utf-32-le", "UTF-32"),
    (codecs.BOM_UTF32_BE, "utf-32-be", "UTF-32"),
    (codecs.BOM_UTF16_LE, "utf-16-le", "UTF-16"),
    (codecs.BOM_UTF16_BE, "utf-16-be", "UTF-16"),
)
# The non-ASCII characters of Western text: letters, quotes, dashes, and the symbols of an office keyboard.
_WESTERN = re.compile(
    "[\u00a0-\u00bf\u00c0-\u00ff\u0152\u0153\u0160\u0161\u0178\u017d\u017e\u2018-\u201e\u2013\u2014\u2026\u20ac"
    "\u2022\u2122\u2039\u203a\u2030\u0192\u02c6\u02dc\u2020\u2021]"
)
# UTF-8 read as Windows-1252, or Czech or Croatian: s and z with a caron next to letters of other languages.
_IMPOSSIBLE = re.compile(
    "[\u00c2\u00c3][\u00a0-\u00bf]|\u00e2\u20ac|(?s:[\u0161\u017e].*[\u00e6\u00e8\u00ec\u00f8\u00f9])"
)
# A symbol or a capital inside a word, four non-ASCII characters in a row, or misread Turkish and Hungarian letters.
_STRANGE = re.compile(
    "[a-z][\u00a1-\u00a9\u00ab-\u00b1\u00b3-\u00b6\u00b8\u00b9\u00bb-\u00bf\u20ac\u0192\u02c6\u201a\u201c-\u201e\u2020-\u2022"
    "\u2030\u2122]+[a-z]"
    "|[a-z\u00df-\u00ff][\u00c0-\u00de\u0160\u0178\u017d]"
    "|[\u00a1-\u00ff\u0152\u0153\u0160\u0161\u0178\u017d\u017e]{4}"
    "|[\u00f0\u00fd\u00fe]|\u00f5(?!e)"
)
MAX_STRANGE_SHARE = 0.02
CHUNK_BYTES = 1 << 20
_WORD = re.compile(r"\S*[^\x00-\x7f]\S*")


class Decoded(NamedTuple):
    """Text without its byte-order mark, and a description of its encoding."""

    text: str
    encoding: str


class Text:
    """The text of an open file, to be read from its start as often as needed.

    encoding: a description. Raises UserError like `decode`.
    """

    def __init__(self, file: BinaryIO, name: str) -> None:
        self._file = file
        self._decoded = ""
        file.seek(0)
        self._is_marked = file.read(len(codecs.BOM_UTF8)) == codecs.BOM_UTF8
        self._is_utf_8 = _is_utf_8(file)
        if self._is_utf_8:
            self.encoding = "UTF-8 with a byte-order mark" if self._is_marked else "UTF-8"
        else:
            file.seek(0)
            self._decoded, self.encoding = decode(file.read(), name)

    def chunks(self) -> Iterator[str]:
        """The text from its start, in parts of any length."""
        if not self._is_utf_8:
            yield self._decoded
            return
        self._file.seek(len(codecs.BOM_UTF8) if self._is_marked else 0)
        decoder = codecs.getincrementaldecoder("utf-8")()
        while content := self._file.read(CHUNK_BYTES):
            yield decoder.decode(content)

    def whole(self) -> str:
        return "".join(self.chunks())


def _is_utf_8(file: BinaryIO) -> bool:
    """Whether a file is UTF-8 without zero bytes."""
    file.seek(0)
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        while content := file.read(CHUNK_BYTES):
            if b"\0" in content:
                return False
            decoder.decode(content)
        decoder.decode(b"", final=True)
    except UnicodeDecodeError:
        return False
    return True


def decode(content: bytes, name: str) -> Decoded:
    """Decode a file's bytes. Raises UserError that names the line if they are not text in a supported encoding."""
    for mark, codec, label in _MARKS:
        if content.startswith(mark):
            return Decoded(_decode(content[len(mark) :], codec, label, name), label)
    if b"\0" in content:
        # Each ASCII character, at least each line end, has its zero byte on one side.
        codec = "utf-16-le" if content[1::2].count(0) > content[::2].count(0) else "utf-16-be"
        return Decoded(_decode(content, codec, "UTF-16", name), "UTF-16 without a byte-order mark")
    try:
        return Decoded(content.decode("utf-8"), "UTF-8")
    except UnicodeDecodeError as error:
        text = _windows_1252(content)
        if text is None:
            raise UserError(
                f"{name!r} is not UTF-8 (byte {error.start}, line {_line(content[: error.start])}), UTF-16 or "
                "Windows-1252; save it as UTF-8"
            ) from error
    words = list(dict.fromkeys(word for word in _WORD.findall(text) if not word.startswith("&")))[:3]
    return Decoded(text, f"Windows-1252 (with words such as {', '.join(words)})")


def _decode(content: bytes, codec: str, label: str, name: str) -> str:
    try:
        text = content.decode(codec)
    except UnicodeDecodeError as error:
        raise UserError(f"{name!r} is not valid {label} (byte {error.start}); save it again, as UTF-8") from error
    if "\0" in text:
        raise UserError(f"{name!r} contains zero bytes: it is not text; export it as CSV or JSON Lines, in UTF-8")
    return text


def _windows_1252(content: bytes) -> str | None:
    """`content` decoded as Windows-1252; None if the result does not look like Western text."""
    try:
        text = content.decode("cp1252")
    except UnicodeDecodeError:
        return None
    non_ascii = [char for char in text if char > "\x7f"]
    n_plain_letters = sum(char.isalpha() for char in text if char <= "\x7f")
    strange = len(_STRANGE.findall(text))
    if len(non_ascii) > n_plain_letters or strange > MAX_STRANGE_SHARE * len(non_ascii) or _IMPOSSIBLE.search(text):
        return None
    return text if all(map(_WESTERN.match, set(non_ascii))) else None


def _line(before: bytes) -> int:
    return len(re.findall(rb"\r\n|\r|\n", before)) + 1
