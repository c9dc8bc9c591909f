"""Text as people paste it into forums, made fit to train on: markup to plain text, odd characters, reasons to drop.

`clean` keeps the words and the paragraph breaks, and nothing that is invisible. `fault` says why a row must not be
used. `normalised` is what two copies of one text have in common, and `question_id` names a question by it.
"""

import hashlib
import html
import re
import unicodedata
from html.parser import HTMLParser

MIN_ANSWER_WORDS = 6

_MARKUP = re.compile(r"</?[a-zA-Z][^<>]*>|<!--")
_BLOCKS = frozenset(
    {"p", "div", "ul", "ol", "li", "table", "tr", "h1", "h2", "h3", "h4", "h5", "h6", "blockquote", "pre", "hr"}
)
_HIDDEN = frozenset({"script", "style", "xml", "head", "title"})

# Joiners (U+200C, U+200D) stay: Persian words and many emoji are spelled with them.
_INVISIBLE = dict.fromkeys([0x00AD, 0x200B, 0x200E, 0x200F, 0x2060, 0xFEFF])
_HALF_PAIRS = re.compile("[\ud800-\udfff]")
_LINE_ENDS = re.compile("\r\n|[\r\x0b\x0c\x85\u2028\u2029]")
_SPACES = re.compile(r"[^\S\n]+")
_NOT_WORDS = re.compile(r"[\W_]+")
_CONTROLS = re.compile(r"[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f]")
# Forum exports lose the break between paragraphs: "a big influence.Otherwise you can".
_GLUED = re.compile(r"(?<=[a-z]{2}[.?!])(?=[A-Z][a-z’'-]*[\s,])")

# Repeats are bounded: a page of pasted base64 must not take minutes.
_EMAIL = re.compile(r"[\w.+-]{1,64}@[\w-]+\.\w+")
_LINK = re.compile(r"https?:|www\.|\w\.(?:com|org|net|edu|gov|ca|io|co\.uk)(?![a-z])", re.IGNORECASE)
_PHONE = re.compile(
    r"(?<![\w/.=-])(?:"
    r"\+\d{1,3}[\s.-]?(?:\(?\d{1,4}\)?[\s.-]?){2,6}\d"  # +44 20 7946 0000
    r"|(?:1[\s.-]?)?\(?\d{3}\)?[\s.-]?\d{3}[\s.-]\d{4}"  # 1-202-555-0100, (202) 555 0100
    r")(?!\d)"
)
# Free-phone numbers belong to services, not to people, and nearly all of those in answers are crisis lines. Short
# ones (988, 911, 112, 116 123) never look like a phone number here.
_FREE_PHONE = re.compile(r"(?:\+?1[\s.-]?)?\(?8(?:00|33|44|55|66|77|88)\b")


class _Text(HTMLParser):
    """Collects what a browser would show, with a blank line between blocks."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self.hidden = 0

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.hidden += tag in _HIDDEN
        if tag == "br":
            self.parts.append("\n")
        elif tag in _BLOCKS:
            self.parts.append("\n- " if tag == "li" else "\n\n")

    def handle_endtag(self, tag: str) -> None:
        self.hidden -= tag in _HIDDEN and self.hidden > 0
        if tag in _BLOCKS and tag != "li":
            self.parts.append("\n\n")

    def handle_data(self, data: str) -> None:
        if not self.hidden:
            self.parts.append(data)


def clean(text: str) -> str:
    """Plain text in Unicode NFC, at most one blank line in a row, no space at a line's ends.

    >>> clean("<p>I&nbsp;can&#39;t   sleep.</p><p>Why?</p>")
    "I can't sleep.\\n\\nWhy?"
    """
    # JSON can hold half of a surrogate pair, which no file in UTF-8 can.
    text = _LINE_ENDS.sub("\n", _HALF_PAIRS.sub("", text))
    if _MARKUP.search(text):
        parser = _Text()
        # In HTML a line's end is a space; only tags and character references break lines.
        parser.feed(" ".join(text.split()))
        parser.close()
        text = "".join(parser.parts)
    else:
        text = html.unescape(text)
    text = unicodedata.normalize("NFC", _LINE_ENDS.sub("\n", text).translate(_INVISIBLE))
    text = _GLUED.sub(" ", _SPACES.sub(" ", _CONTROLS.sub("", text)))
    lines = "\n".join(line.strip() for line in text.split("\n"))
    return re.sub(r"\n{3,}", "\n\n", lines).strip()


def fault(question: str, answer: str) -> str | None:
    """Why a cleaned pair must not be used, or None. The first fault that applies is the one that is counted."""
    if not normalised(question):
        return "empty question"
    if not normalised(answer):
        return "empty answer"
    for text in (question, answer):
        if _EMAIL.search(text):
            return "e-mail address"
        if _LINK.search(text):
            return "link"
        if any(not _FREE_PHONE.match(found[0]) for found in _PHONE.finditer(text)):
            return "phone number"
    if len(answer.split()) < MIN_ANSWER_WORDS:
        return f"answer under {MIN_ANSWER_WORDS} words"
    return None


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
