"""How much at once: sequences in flight per key (429 beyond) and on the whole server (503 beyond).

A request counts for as many sequences as it makes the engine run: `n` times the number of prompts. What is admitted
beyond the engine's running set waits inside the engine, so the server-wide bound is also the bound of its queue.
"""

from collections import Counter

from serve.openai_errors import Refusal


class Limits:
    """Counters of what is in flight; `enter` refuses, `leave` gives back."""

    def __init__(self, per_key: int, total: int) -> None:
        self.per_key, self.total = per_key, total
        self.in_flight = 0
        self.by_key: Counter[str] = Counter()

    def enter(self, key: str, n_sequences: int) -> None:
        """Count a request in, or raise Refusal with the seconds after which to try again."""
        if n_sequences > self.per_key:
            raise Refusal(
                400, f"the request asks for {n_sequences} answers; at most {self.per_key} are allowed", param="n"
            )
        if self.by_key[key] + n_sequences > self.per_key:
            raise Refusal(429, f"this key has {self.by_key[key]} requests in flight of {self.per_key}", retry_after_s=1)
        if self.in_flight + n_sequences > self.total:
            raise Refusal(503, f"the server is full: {self.in_flight} requests in flight", retry_after_s=2)
        self.by_key[key] += n_sequences
        self.in_flight += n_sequences

    def leave(self, key: str, n_sequences: int) -> None:
        """Count a request out."""
        self.in_flight -= n_sequences
        self.by_key[key] -= n_sequences
        if not self.by_key[key]:
            del self.by_key[key]
