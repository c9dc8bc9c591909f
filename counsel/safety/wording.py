"""What the wording of a message says that a sentence embedding blurs: who, when, negated or not, figurative or not.

Each pattern of `data/wording.yaml` is one feature, 1 or 0. The classifier weighs them together with the embedding; none
decides alone. Patterns read normalized text.
"""

import functools
import re
from collections.abc import Sequence
from importlib.resources import files

import numpy as np
from numpy.typing import NDArray


@functools.cache
def wording_patterns() -> dict[str, re.Pattern[str]]:
    """The patterns by name, in the order of the features."""
    import yaml

    document = yaml.safe_load((files("counsel.safety") / "data" / "wording.yaml").read_text(encoding="utf-8"))
    parts: dict[str, str] = {}

    def filled(pattern: str) -> str:
        for name, part in parts.items():
            pattern = pattern.replace(f"<{name}>", part)
        return pattern

    for name, part in document["parts"].items():
        parts[name] = filled(part)
    return {name: re.compile(filled(pattern)) for name, pattern in document["features"].items()}


def wording_features(texts: Sequence[str]) -> NDArray[np.float32]:
    """One row of 0 and 1 per normalized text, one column per pattern."""
    patterns = wording_patterns().values()
    found = [[bool(pattern.search(text)) for pattern in patterns] for text in texts]
    return np.array(found, dtype=np.float32).reshape(len(texts), len(patterns))
