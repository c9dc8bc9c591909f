"""Finds links, e-mail addresses and phone numbers: what a model must not repeat and a vote must not keep.

Contacts of crisis services are kept. Their short numbers (988, 116 123, 13 11 14) do not match as phone numbers.
Toll-free numbers, numbers that the text calls a helpline's, and the sites of helplines are excluded.
"""

import re
from typing import NamedTuple

EMAIL, LINK, PHONE = "e-mail address", "link", "phone number"

# Repeats are bounded, so that a page of pasted base64 does not take minutes.
_LABEL = "[A-Za-z0-9\u00c0-\u024f-]{1,63}"
_START = "(?<![A-Za-z0-9\u00c0-\u024f-])"
_IN_ADDRESS = "[!#-;=?-~\u00c0-\u024f]"
_ENDINGS = ("com", "org", "net", "edu", "gov", "ca", "io", "co.uk")
# An ending in lower or upper case only: "no.Org" is two sentences with a missing space.
_ENDING = "|".join(re.escape(form) for ending in _ENDINGS for form in (ending, ending.upper()))
_EMAIL = re.compile(rf"[\w.+-]{{1,64}}@{_LABEL}(?:\.{_LABEL}){{1,8}}")
# "I saw him.he/she left" is two sentences with a missing space: a short word on each side of the slash.
_CHOICE = r"(?:a[mnst]|b[ey]|do|go|h[ei]|i[fnst]|m[ey]|no|o[fhknr]|so|to|u[ps]|we)/[^\W\d_]{1,7}(?![\w/?#=-])"
_LINK = re.compile(
    rf"[Hh][Tt][Tt][Pp][Ss]?:{_IN_ADDRESS}*"
    rf"|[Ww][Ww][Ww]\.{_IN_ADDRESS}*"
    rf"|{_START}(?:{_LABEL}\.){{1,8}}(?:{_ENDING})(?:\.[a-z]{{2}})?(?![A-Za-z])(?:[/?#:]{_IN_ADDRESS}*)?"
    rf"|{_START}(?:t|wa)\.me/\w{_IN_ADDRESS}*"
    rf"|{_START}(?:{_LABEL}\.){{1,8}}(?!{_CHOICE})[a-z]{{2}}/\w{_IN_ADDRESS}*"  # bit.ly/..., example.de/...
)
_PHONE = re.compile(
    r"(?<![A-Za-z0-9_/.=-])(?:"
    r"\+\d{1,3}[\s.-]?(?:\(?\d{1,4}\)?[\s.-]?){2,6}\d"  # +44 20 7946 0000
    r"|(?:1[\s.-]?)?\(?\d{3}\)?[\s.-]?\d{3}[\s.-]\d{4}"  # 1-202-555-0100, (202) 555 0100
    r"|\(?0\d{2,4}\)?[ /-]{1,3}\d{3,8}(?:[ -]?\d{2,4}){0,2}"  # 07700 900123, (0171) 2345678
    r"|0\d(?: \d\d){4}"  # 06 12 34 56 78
    r"|\d{10}|0\d{10}"
    r")(?!\d)"
)
MIN_PHONE_DIGITS = 9  # fewer digits are dates and short codes
# Toll-free numbers belong to services, and nearly all of those in answers are crisis lines. Only certain matches count:
# mobile numbers start alike in other countries (0300 1234567 in Pakistan), and so do area codes (01202, +44 116).
_COUNTRY = (
    r"\+(?:7|2[07]|3[0-469]|4[013-9]|5[1-8]|6[0-6]|8[1246]|9[0-58]|(?:2[1-689]|3[578]|42|5[09]|6[789]|8[0578]|9[679])\d)"
    r"[\s.-]?(?:\(?0\)?[\s.-]?)?"
)
_MOBILE_80 = r"\+(?:65|66|91|505|506|855)"
_TOLL_FREE = re.compile(
    r"(?:\+?1[\s.-]?\(?|\()8(?:00|33|44|55|66|77|88)|8(?:00|33|44|55|66|77|88)[\s.-]"
    r"|\(?0(?:0?800|808)|\(?0(?:120|508|845)(?!\d)|\(?0300\)?[\s.-]\d{3}[\s.-]\d{4}(?!\d)"
    rf"|(?!{_MOBILE_80}){_COUNTRY}800|\+44[\s.-]?(?:\(?0\)?[\s.-]?)?808"
    r"|\+(?:6[01356]|91|353)[\s.-]?1800|\+6[01][\s.-]?1300|\+61[\s.-]?13[\s.-]?11"
    rf"|{_COUNTRY}116[\s.-]?\d{{3}}(?![\s.-]?\d)"
)
_SERVICE = (
    r"(?:life|help|hot|warm|crisis[ -]?|text)[ -]?lines?\b|crisis (?:cent(?:er|re)|team|service)s?\b|samaritans"
    r"|befrienders|childline|suicide prevention|sos amiti\u00e9|seelsorge|krisen(?:dienst|telefon)"
)
_SERVICE_BEFORE = re.compile(rf"(?:{_SERVICE})(?P<between>[^.!?\n]{{0,60}})\Z", re.IGNORECASE)
_SERVICE_AFTER = re.compile(rf"(?P<between>[^.!?\n]{{0,30}}?)(?:{_SERVICE})", re.IGNORECASE)
_PERSONAL = re.compile(r"\b(?:me|my|mine|us|our)\b", re.IGNORECASE)
_HELP_SITE = re.compile(
    r"(?:lifeline|helpline|hotline|crisistextline|crisisline|suicideprevention|samaritans|beyondblue|befrienders|telefonseelsorge"
    r"|thetrevorproject|kidshelpphone|childline|\b988|\brainn|\bnami|\biasp)[a-z0-9-]*\.|\b113\.nl|\bsuicide\.org",
    re.IGNORECASE,
)
_HELP_PAGE = re.compile(r"/\S*(?:hot|help|life|crisis[_-]?)lines?\b", re.IGNORECASE)
_HOST = re.compile(r"(?:https?:/*)?([^/?#]*)", re.IGNORECASE)


class Contact(NamedTuple):
    """One contact: its kind, and its position in the text."""

    kind: str
    start: int
    end: int


def contacts(text: str) -> list[Contact]:
    """The contact details of people in `text`, in order of position, without those of crisis services.

    >>> contacts("Mail a@b.org, see b.org/x.")
    [Contact(kind='e-mail address', start=5, end=12), Contact(kind='link', start=18, end=25)]
    """
    matches: list[Contact] = []
    for kind, pattern in ((EMAIL, _EMAIL), (LINK, _LINK), (PHONE, _PHONE)):
        for match in pattern.finditer(text):
            start, end = match.start(), match.start() + len(_without_punctuation(match[0]))
            short = kind == PHONE and sum(map(str.isdigit, match[0])) < MIN_PHONE_DIGITS
            if end > start and not short and not any(start < other.end and other.start < end for other in matches):
                matches.append(Contact(kind, start, end))
    personal = (contact for contact in matches if not _is_crisis_service(text, contact))
    return sorted(personal, key=lambda contact: contact.start)


def mask(text: str) -> str:
    """`text` with each contact replaced by `[link]`, `[e-mail address]` or `[phone number]`."""
    for contact in reversed(contacts(text)):
        text = f"{text[: contact.start]}[{contact.kind}]{text[contact.end :]}"
    return text


def _without_punctuation(address: str) -> str:
    """An address without the punctuation of its sentence; a closing bracket is kept if the address also opens one."""
    while address and (
        address[-1] in ".,;:!?'*_]}" or (address[-1] == ")" and address.count(")") > address.count("("))
    ):
        address = address[:-1]
    return address


def _is_crisis_service(text: str, contact: Contact) -> bool:
    address = text[contact.start : contact.end]
    if contact.kind == LINK:
        host = _HOST.match(address)
        assert host is not None  # it may be empty
        return bool(_HELP_SITE.search(host[1]) or _HELP_PAGE.search(address, host.end()))
    if contact.kind == EMAIL:
        return _HELP_SITE.search(address.partition("@")[2]) is not None
    if _TOLL_FREE.match(address):
        return True
    around = (_SERVICE_BEFORE.search(text[max(0, contact.start - 90) : contact.start]),
              _SERVICE_AFTER.match(text[contact.end : contact.end + 60]))  # fmt: skip
    return any(match is not None and not _PERSONAL.search(match["between"]) for match in around)
