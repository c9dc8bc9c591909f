"""What the wording of a message says that a sentence embedding blurs: who, when, negated or not, figurative or not.

Each pattern of `data/wording.yaml` is one feature, 1 or 0. The classifier weighs them together with the embedding; none
decides alone. Patterns read normalized text.
"""

import functools
import re
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

import numpy as np
from numpy.typing import NDArray


@functools.cache
def wording_patterns() -> dict[str, re.Pattern[str]]:
    """The patterns by name, in the order of the features."""
    document = _document()
    parts: dict[str, str] = {}

    def filled(pattern: str) -> str:
        for name, part in parts.items():
            pattern = pattern.replace(f"<{name}>", part)
        return pattern

    for name, part in document["parts"].items():
        parts[name] = filled(part)
    return {name: re.compile(filled(pattern)) for name, pattern in document["features"].items()}


def explicit_columns() -> list[int]:
    """The columns of the patterns that say something of death or harm in so many words."""
    names = list(wording_patterns())
    return [names.index(name) for name in _document()["explicit"]]


@functools.cache
def _document() -> dict[str, Any]:
    import yaml

    document: dict[str, Any] = yaml.safe_load(
        (files("counsel.safety") / "data" / "wording.yaml").read_text(encoding="utf-8")
    )
    return document


def wording_features(texts: Sequence[str]) -> NDArray[np.float32]:
    """One row of 0 and 1 per normalized text, one column per pattern."""
    patterns = wording_patterns().values()
    found = [[bool(pattern.search(text)) for pattern in patterns] for text in texts]
    return np.array(found, dtype=np.float32).reshape(len(texts), len(patterns))
