"""Text as people paste it into forums, made fit to train on: plain text, odd characters, length, copies.

`clean` keeps the words and the paragraph breaks, and nothing that is invisible. `drop_reason` says why a row must not
be used. `normalised` is what two copies of one text have in common, and `question_id` names a question by it.
"""

import hashlib
import re
import unicodedata

from train.contacts import EMAIL, LINK, PHONE, contacts
from train.markup import plain_text

MIN_ANSWER_WORDS = 6

# Joiners (U+200C, U+200D) stay: Persian words and many emoji are spelled with them.
_INVISIBLE = dict.fromkeys([0x00AD, 0x200B, 0x200E, 0x200F, 0x2060, 0xFEFF])
_HALF_PAIRS = re.compile("[\ud800-\udfff]")
_LINE_ENDS = re.compile("\r\n|[\r\x0b\x0c\x85\u2028\u2029]")
_SPACES = re.compile(r"[^\S\n]+")
_NOT_WORDS = re.compile(r"[\W_]+")
_CONTROLS = re.compile(r"[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f]")
# Forum exports lose the break between paragraphs: "a big influence.Otherwise you can".
_GLUED = re.compile(r"(?<=[a-z]{2}[.?!])(?=[A-Z][a-z\u2019'-]*[\s,])")

# Scripts that put no spaces between words, and how many of their letters make a word, about: Chinese and Japanese 1.5,
# Korean (whose spaces part phrases) 2, Thai, Lao, Burmese and Khmer 3, signs for vowels and tones not counted.
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
    """Plain text in Unicode NFC, at most one blank line in a row, no space at a line's ends. Clean text stays as it is.

    >>> clean("<p>I&nbsp;can&#39;t   sleep.</p><p>Why?</p>")
    "I can't sleep.\\n\\nWhy?"
    """
    # Exports escape twice, so that what comes out of one round may be markup again.
    while (cleaner := _clean_once(text)) != text:
        text = cleaner
    return text


def _clean_once(text: str) -> str:
    # JSON can hold half of a surrogate pair, which no file in UTF-8 can.
    text = plain_text(_LINE_ENDS.sub("\n", _HALF_PAIRS.sub("", text)))
    text = unicodedata.normalize("NFC", _LINE_ENDS.sub("\n", text).translate(_INVISIBLE))
    text = _GLUED.sub(" ", _SPACES.sub(" ", _CONTROLS.sub("", text)))
    lines = "\n".join(line.strip() for line in text.split("\n"))
    return re.sub(r"\n{3,}", "\n\n", lines).strip()


def drop_reason(question: str, answer: str) -> str | None:
    """Why a cleaned pair must not be used, or None. The first fault that applies is the one that is counted."""
    if not normalised(question):
        return "empty question"
    if not normalised(answer):
        return "empty answer"
    for text in (question, answer):
        kinds = {contact.kind for contact in contacts(text)}
        for kind in (EMAIL, LINK, PHONE):
            if kind in kinds:
                return kind
    if count_words(answer) < MIN_ANSWER_WORDS:
        return f"answer under {MIN_ANSWER_WORDS} words"
    return None


def count_words(text: str) -> int:
    """Words between spaces; where a script has no spaces between words, about as many as its letters make.

    >>> count_words("Rest a little."), count_words("\u8bf7\u4f11\u606f\u4e00\u4e0b\u3002")
    (3, 3)
    """
    n_words = 0.0
    for letters, per_word in _UNSPACED if not text.isascii() else ():
        text, n_letters = letters.subn(" ", text)
        n_words += n_letters / per_word
    return round(n_words) + sum(any(map(str.isalnum, word)) for word in text.split())


def normalised(text: str) -> str:
    """The letters, their marks and the digits of `text`, case folded, without spaces: equal for copies of one text.

    >>> normalised("I can't sleep!") == normalised("i  cant\\nSLEEP")
    True
    """
    # Folded, the Turkish capital \u0130 is an i with a dot more than the i of its copies.
    folded = unicodedata.normalize("NFKC", text).casefold().replace("i\u0307", "i")
    return unicodedata.normalize("NFKC", _NOT_WORDS.sub(_marks, folded))


def _marks(gap: re.Match[str]) -> str:
    """The vowel signs and accents among characters that are no letters: Hindi, Bengali and Thai write words with them.

    `re` counts them as no part of a word. Variation selectors are marks that only choose between two pictures.
    """
    if gap[0].isascii():
        return ""
    return "".join(
        char
        for char in gap[0]
        if unicodedata.category(char)[0] == "M" and "VARIATION SELECTOR" not in unicodedata.name(char, "")
    )


def question_id(question: str) -> str:
    """The first 16 hex digits of the SHA-256 of the normalised question."""
    return hashlib.sha256(normalised(question).encode()).hexdigest()[:16]
