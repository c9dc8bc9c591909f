"""The list of keywords that a service without a classifier would use: the baseline of the reports."""

import re

_KEYWORDS = re.compile(
    r"suicid|kill (?:myself|my self)|killing myself|end my life|take my (?:own )?life|want to die|"
    r"wanna die|better off dead|"
    r"self[- ]?harm|cut(?:ting)? myself|"
    r"hurt(?:ing)? myself|overdose|hang myself|shoot myself|no reason to live|kms\b",
    re.IGNORECASE,
)


def has_keyword(text: str) -> bool:
    """Whether a raw text has any word of the list."""
    return bool(_KEYWORDS.search(text))
