"""Converts HTML from forums and office programs to plain text, but keeps `<NAME>`, `<sigh>` and `a<b`.

A tag counts as markup if HTML has its name and it is a block, has an attribute, or has an end tag. `<title>` or
`<link>` alone is a placeholder that a person typed.
"""

import html
import re
from html.entities import html5
from html.parser import HTMLParser

_BLOCKS = frozenset(
    re.findall(r"\w+", "p div ul ol li table thead tbody tr td th h1 h2 h3 h4 h5 h6 blockquote pre hr br dl dt dd")
)
_HIDDEN = frozenset({"script", "style", "xml", "head", "title"})
_INLINE = frozenset(
    re.findall(
        r"\w+",
        """a abbr acronym address article aside audio b bdi bdo big body button caption center cite code col colgroup
        data del details dfn em embed figcaption figure font footer form header html i iframe img input ins kbd label
        link main mark meta nav noscript object option picture q s samp section select small source span strike strong
        sub summary sup svg template textarea tfoot time tt u var video wbr""",
    )
)
# Attributes are not parsed: office programs write quotes within quotes.
_TAG = re.compile(r"<(?P<end>/?)(?P<name>[a-zA-Z][a-zA-Z0-9]*|[a-z]+:[a-z]+)(?P<rest>(?:\s[^<>]*?)?)(?P<closed>/?)>")
_DECLARATION = re.compile(r"<!--.*?-->|<!doctype[^<>]*>|<!\[[^<>]*\]>|<\?xml[^<>]*>", re.DOTALL | re.IGNORECASE)
_REFERENCE = re.compile(r"&(?:#\d{1,7}|#[xX][0-9a-fA-F]{1,6}|[a-zA-Z][a-zA-Z0-9]{1,31});")

# Collapsed first: text that was escaped a thousand times would otherwise be decoded a thousand times.
_REPEATED_ESCAPE = re.compile(r"&(?:amp|#38|#[xX]26);(?:(?:amp|#38|#[xX]26);)+")


class _Text(HTMLParser):
    """Collects the text that a browser would show, with a blank line between blocks."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self.hidden = 0

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.hidden += tag in _HIDDEN
        if tag == "br":
            self.parts.append("\n")
        elif tag in ("td", "th"):
            self.parts.append(" ")
        elif tag in _BLOCKS:
            self.parts.append("\n- " if tag == "li" else "\n\n")

    def handle_endtag(self, tag: str) -> None:
        self.hidden -= tag in _HIDDEN and self.hidden > 0
        if tag in _BLOCKS and tag not in ("li", "td", "th", "br"):
            self.parts.append("\n\n")

    def handle_data(self, data: str) -> None:
        if not self.hidden:
            self.parts.append(data)


def plain_text(text: str) -> str:
    """`text` without markup, and with its character references decoded once.

    HTML treats a line end, and even a blank line, as a space. But people type line ends and add only a tag or two, so
    line ends are kept unless there are block tags, and blank lines are always kept.
    """
    text = _REPEATED_ESCAPE.sub("&amp;", text)
    if "<" not in text:
        return _decoded(text)
    closed = {match["name"].lower() for match in _TAG.finditer(text) if match["end"]}
    tags = {match.start(): match["name"].lower() for match in _TAG.finditer(text) if _is_markup(match, closed)}
    # Up to the end of the last comment only: each unclosed comment would be searched to the end of the text.
    n_closed = max(text.rfind(">") + 1 if "<!--" not in text else text.rfind("-->") + 3, 0)
    declarations = {match.start() for match in _DECLARATION.finditer(text, 0, n_closed)}
    if not tags and not declarations:
        return _decoded(text)
    marked = _escaped(text, tags.keys() | declarations)
    if any(name in _BLOCKS for name in tags.values()):
        paragraphs = re.split(r"\n[^\S\n]*\n\s*", marked)
        marked = "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)
    parser = _Text()
    parser.feed(marked)
    parser.close()
    return "".join(parser.parts)


def _is_markup(tag: re.Match[str], closed: set[str]) -> bool:
    name = tag["name"].lower()
    if ":" in name:  # from Word, such as <o:p>
        return bool(tag["closed"]) or name in closed
    if name not in _BLOCKS | _INLINE | _HIDDEN:
        return False
    if tag["end"] or tag["closed"] or "=" in tag["rest"]:
        return True
    return not tag["rest"].strip() and (name in _BLOCKS or name in closed)


def _escaped(text: str, kept: set[int]) -> str:
    """`text` with every `<` that is not in `kept`, and every `&` that starts no reference, escaped for the parser."""
    text = re.sub("<", lambda match: "<" if match.start() in kept else "&lt;", text)
    return re.sub("&", lambda match: "&" if _is_reference(_REFERENCE.match(text, match.start())) else "&amp;", text)


def _decoded(text: str) -> str:
    return _REFERENCE.sub(lambda match: html.unescape(match[0]) if _is_reference(match) else match[0], text)


def _is_reference(match: re.Match[str] | None) -> bool:
    return match is not None and (match[0][1] == "#" or match[0][1:] in html5)
