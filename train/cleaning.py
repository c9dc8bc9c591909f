"""Cleans text that people pasted into forums, so that a model can train on it.

`clean` keeps the words and the paragraph breaks, and removes markup and invisible characters. `drop_reason` is why a
row must not be used. `normalized` is equal for copies of one text, and `question_id` is a hash of it.
"""

import hashlib
import re
import unicodedata
from collections.abc import Sequence

from counsel.contacts import EMAIL, LINK, PHONE, contacts
from train.markup import plain_text

MIN_ANSWER_WORDS = 6
# Characters of a row shown around the reason for dropping it.
EXCERPT_CHARS = 80

# Joiners (U+200C, U+200D) are kept: Persian words and many emoji need them.
_INVISIBLE = dict.fromkeys([0x00AD, 0x200B, 0x200E, 0x200F, 0x2060, 0xFEFF])
_LONE_SURROGATES = re.compile("[\ud800-\udfff]")
_LINE_ENDS = re.compile("\r\n|[\r\x0b\x0c\x85\u2028\u2029]")
_SPACES = re.compile(r"[^\S\n]+")
_NOT_WORDS = re.compile(r"[\W_]+")
_CONTROLS = re.compile(r"[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f]")
# Forum exports lose the break between paragraphs: "a big influence.Otherwise you can".
_MISSING_SPACE = re.compile(r"(?<=[a-z]{2}[.?!])(?=[A-Z][a-z\u2019'-]*[\s,])")

# Scripts without spaces between words, and roughly how many of their letters make a word: Chinese and Japanese 1.5,
# Korean (whose spaces separate phrases) 2, Thai, Lao, Burmese and Khmer 3, without vowel and tone signs.
_HAN_AND_KANA = (
    "\u3005-\u3007\u3041-\u30fa\u30fc-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff"
)
_THAI_AND_LAO = "\u0e01-\u0e30\u0e32\u0e33\u0e40-\u0e46\u0e81-\u0eb0\u0eb2\u0eb3\u0ebd-\u0ec6"
_UNSPACED = (
    (re.compile(f"[{_HAN_AND_KANA}]"), 1.5),
    (re.compile("[\u1100-\u11ff\uac00-\ud7a3]"), 2.0),
    (re.compile(f"[{_THAI_AND_LAO}\u1000-\u102a\u1780-\u17b3]"), 3.0),
)


def clean(text: str) -> str:
    """Plain text in Unicode NFC, at most one blank line in a row, no space around a line. Clean text does not change.

    >>> clean("<p>I&nbsp;can&#39;t   sleep.</p><p>Why?</p>")
    "I can't sleep.\\n\\nWhy?"
    """
    # Exports escape markup twice, so one round may uncover more of it.
    while (cleaner := _clean_once(text)) != text:
        text = cleaner
    return text


def _clean_once(text: str) -> str:
    # JSON can hold an unpaired surrogate, which UTF-8 cannot encode.
    text = plain_text(_LINE_ENDS.sub("\n", _LONE_SURROGATES.sub("", text)))
    text = unicodedata.normalize("NFC", _LINE_ENDS.sub("\n", text).translate(_INVISIBLE))
    text = _MISSING_SPACE.sub(" ", _SPACES.sub(" ", _CONTROLS.sub("", text)))
    lines = "\n".join(line.strip() for line in text.split("\n"))
    return re.sub(r"\n{3,}", "\n\n", lines).strip()


def drop_reason(question: str, *turns: str) -> str | None:
    """Why a cleaned conversation must not be used; None if it may be. The first reason that applies.

    turns: what follows the question: a reply, a user turn, a reply and so on. Contacts in any turn are a reason.
    Replies are too short if none has MIN_ANSWER_WORDS words: in a long conversation, "Take your time." has its place.
    """
    replies = turns[::2]
    if not normalized(question):
        return "empty question"
    if not any(map(normalized, replies)):
        return "empty answer"
    for text in (question, *turns):
        kinds = {contact.kind for contact in contacts(text)}
        for kind in (EMAIL, LINK, PHONE):
            if kind in kinds:
                return kind
    if max(map(count_words, replies)) < MIN_ANSWER_WORDS:
        return f"answer under {MIN_ANSWER_WORDS} words"
    return None


def drop_excerpt(reason: str, said: Sequence[str]) -> str:
    """The part of a conversation that it was dropped for, with the text around it. said: its turns."""
    for text in said:
        for contact in contacts(text):
            if contact.kind == reason:
                room = max(0, EXCERPT_CHARS - (contact.end - contact.start)) // 2
                return one_line(text[max(0, contact.start - room) :])
    if not said:
        return ""
    return one_line(said[0] if reason.startswith("empty") else said[1])


def one_line(text: str) -> str:
    """The start of a text, without line breaks."""
    text = " ".join(text.split())
    return text if len(text) <= EXCERPT_CHARS else f"{text[:EXCERPT_CHARS]}..."


def count_words(text: str) -> int:
    """The number of words. In scripts without spaces between words, an estimate from the number of letters.

    >>> count_words("Rest a little."), count_words("\u8bf7\u4f11\u606f\u4e00\u4e0b\u3002")
    (3, 3)
    """
    n_words = 0.0
    for letters, per_word in _UNSPACED if not text.isascii() else ():
        text, n_letters = letters.subn(" ", text)
        n_words += n_letters / per_word
    return round(n_words) + sum(any(map(str.isalnum, word)) for word in text.split())


def normalized(text: str) -> str:
    """The letters, marks and digits of `text`, case-folded and without spaces: equal for copies of one text.

    >>> normalized("I can't sleep!") == normalized("i  cant\\nSLEEP")
    True
    """
    # Case-folding turns the Turkish capital \u0130 into an i and a combining dot, which its copies lack.
    folded = unicodedata.normalize("NFKC", text).casefold().replace("i\u0307", "i")
    return unicodedata.normalize("NFKC", _NOT_WORDS.sub(_marks, folded))


def _marks(gap: re.Match[str]) -> str:
    """The vowel signs and accents between letters, which Hindi, Bengali and Thai words need.

    `re` does not count them as word characters. Variation selectors are dropped: they only choose between two glyphs.
    """
    if gap[0].isascii():
        return ""
    return "".join(
        char
        for char in gap[0]
        if unicodedata.category(char)[0] == "M" and "VARIATION SELECTOR" not in unicodedata.name(char, "")
    )


def question_id(question: str) -> str:
    """The first 16 hex digits of the SHA-256 of the normalized question."""
    return hashlib.sha256(normalized(question).encode()).hexdigest()[:16]
