"""The trained part of the detector: a fine-tuned encoder and a kernel machine on the plain one, of equal weight.

They fail on different messages. Only the fine-tuned one learned to find a sentence among others, so it reads the
passages of a long message alone.
"""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from counsel.errors import UserError
from counsel.safety.encoder import MODULES, PooledEncoder, Updates
from counsel.safety.features import pattern_names, text_features
from counsel.safety.kernel import KernelMachine
from counsel.safety.labels import LABELS, RISKS
from counsel.safety.units import Unit

Shares = NDArray[np.float64]
REBUILD = "build it again: python -m counsel.safety.build"


class Classifier(NamedTuple):
    """All arrays of `detector.npz`."""

    updates: Updates
    kernel: KernelMachine


class Reader:
    """Turns normalized texts into probabilities; holds the encoder twice, as it is and with the updates."""

    def __init__(self, classifier: Classifier) -> None:
        self._classifier, self._support = classifier, classifier.kernel.examples()
        self._plain, self._tuned = PooledEncoder(), PooledEncoder(classifier.updates)

    def read(self, units: Sequence[Unit]) -> Shares:
        """The probability of each of LABELS, (n, 6)."""
        texts = [unit.text for unit in units]
        shares: Shares = self._classifier.updates.shares(self._tuned.pooled(texts))
        if alone := [at for at, unit in enumerate(units) if unit.siblings == 1]:
            whole = [texts[at] for at in alone]
            plain = self._classifier.kernel.shares(text_features(self._plain.pooled(whole), whole), self._support)
            shares[alone] = (shares[alone] + plain) / 2
        return shares


def to_bytes(classifier: Classifier) -> bytes:
    """The file's content: an npz of plain arrays."""
    updates = classifier.updates
    arrays = {f"{side}.{module}": getattr(updates, side)[module] for side in ("down", "up") for module in MODULES}
    arrays |= {"head": updates.head, "head_bias": updates.bias}
    arrays |= {f"kernel.{name}": array for name, array in classifier.kernel._asdict().items()}
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    return buffer.getvalue()


def read_classifier(path: Path) -> Classifier:
    """Raises UserError where the file is absent, is not such a file, or was built for other labels or wording."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            down, up = ({module: arrays[f"{side}.{module}"] for module in MODULES} for side in ("down", "up"))
            updates = Updates(down, up, arrays["head"], arrays["head_bias"])
            kernel = KernelMachine(**{name: arrays[f"kernel.{name}"] for name in KernelMachine._fields})
    except OSError as error:
        raise UserError(
            f"cannot read the crisis detector {str(path)!r}: {error.strerror or error}; {REBUILD}"
        ) from error
    except (ValueError, KeyError) as error:
        raise UserError(f"{str(path)!r} is not a crisis detector: {error}; {REBUILD}") from error
    if len(updates.head) != len(LABELS) or len(kernel.kind_weights) != len(RISKS):
        raise UserError(f"the crisis detector {str(path)!r} was built for other labels; {REBUILD}")
    if list(kernel.patterns) != pattern_names():
        raise UserError(f"the crisis detector {str(path)!r} was built for other wording features; {REBUILD}")
    return Classifier(updates, kernel)
