"""When a conversation is told that it talks to an AI: at its start, after some hours, and when someone asks.

The API has no sessions, so a conversation is recognized by its first user turn and its key, as a salted hash that no
other process can compute. Times are kept in memory only. A conversation that is not known here is told again.
"""

import hashlib
import re
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable

START, INTERVAL, ASKED = "start", "interval", "asked"
_CAPACITY = 20_000
_ASKS = re.compile(
    r"\b(?:are|r)\s+(?:you|u)\s+(?:even\s+|really\s+|actually\s+|just\s+|like\s+)*(?:an?\s+)?(?:actual\s+|real\s+|live\s+)*"
    r"(?:human|person|real|robot|bot|chatbot|ai\b|a\.i\.|machine|computer|program|alive|therapist"  # what it is never
    r"|counsell?or|doctor)"
    r"|\b(?:am\s+i|is\s+this|i'?m\s+i)\s+(?:\w+\s+)?(?:talking|speaking|chatting|texting|writing)\s+(?:to|with)\b"
    r"|\bis\s+(?:this|that|there)\s+(?:an?\s+)?(?:real\s+|actual\s+)?(?:human|person|bot|robot|ai|machine|computer)\b",
    re.IGNORECASE,
)


class Disclosures:
    """Which conversations were told, and when. Lives on one event loop."""

    def __init__(self, every_h: float, clock: Callable[[], float] = time.monotonic) -> None:
        """`every_h`: hours after which a conversation is told again; 0: only at its start."""
        self._every_s, self._clock = every_h * 3600, clock
        self._salt = secrets.token_bytes(32)
        self._told_s: OrderedDict[str, float] = OrderedDict()

    def conversation(self, key: str, first_turn: str) -> str:
        """The name of a conversation: 32 hex digits that tell nothing about it."""
        text = f"{key}\0{first_turn}".encode(errors="surrogatepass")
        return hashlib.blake2b(text, key=self._salt, digest_size=16).hexdigest()

    def due(self, conversation: str, newest_turn: str, *, is_first: bool) -> str:
        """Why the conversation is to be told now, or "". It then counts as told."""
        now_s = self._clock()
        told_s = self._told_s.get(conversation)
        if _ASKS.search(newest_turn):
            reason = ASKED
        elif is_first:
            reason = START
        elif told_s is None or (self._every_s and now_s - told_s >= self._every_s):
            reason = INTERVAL
        else:
            return ""
        self._told_s[conversation] = now_s
        self._told_s.move_to_end(conversation)
        if len(self._told_s) > _CAPACITY:
            self._told_s.popitem(last=False)
        return reason
