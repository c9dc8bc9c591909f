"""What an answer shows, as far as a scripted person notices: plain rules on its words, in English."""

import re
from collections.abc import Callable, Mapping

from eval.text_stats import words

SHORT_WORDS = 12
_LIST_LINE = re.compile(r"^\s*(?:[-*•]|\d+[.)])\s+\S", re.MULTILINE)
_QUESTION = re.compile(r"\?(?=[\s\"')*”’]|$)")
_FEELINGS = frozenset((
    "afraid", "alone", "angry", "anxiety", "anxious", "ashamed", "calm", "cross", "disappointed", "disappointing",
    "discouraged", "discouraging", "embarrassed", "embarrassing", "emotional", "exhausted", "exhausting", "fear",
    "frustrated", "frustrating", "frustration", "grief", "guilty", "happy", "hopeful", "hurt", "hurtful",
    "isolated", "isolating", "joy", "loneliness", "lonely", "nervous", "overwhelmed", "overwhelming", "painful",
    "proud", "relief", "relieved", "sad", "sadness", "scared", "scary", "shame", "stress", "stressed", "stressful",
    "tired", "tiring", "uneasy", "unhappy", "upset", "upsetting", "worried", "worry",
))  # fmt: skip

FEATURES: Mapping[str, Callable[[str], bool]] = {
    "question": lambda text: bool(_QUESTION.search(text)),
    "feeling": lambda text: not _FEELINGS.isdisjoint(words(text)),
    "list": lambda text: len(_LIST_LINE.findall(text)) >= 2,
    "short": lambda text: len(words(text)) < SHORT_WORDS,
}
OTHERWISE = "otherwise"
