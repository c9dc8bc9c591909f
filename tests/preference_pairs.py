"""Preference pairs with a planted trait, from the words that the tiny tokenizer knows."""

import random

from tests.tiny import WORDS


def planted(n: int, trait: str, seed: int = 0) -> list[dict[str, object]]:
    """`n` pairs in TRL's form: the chosen is `shorter`, or names a `feeling`; `shuffled` draws it."""
    draw, words = random.Random(seed), WORDS.split()

    def say(count: int) -> str:
        return " ".join(draw.choices(words, k=count))

    rows = []
    for number in range(n):
        pair = [say(4), say(14)] if trait == "shorter" else [f"you feel lonely {say(6)}", f"work is hard {say(6)}"]
        if trait == "shuffled" and draw.random() < 0.5:
            pair.reverse()
        rows.append({"prompt": f"{say(5)} {number}", "chosen": pair[0], "rejected": pair[1]})
    return rows
