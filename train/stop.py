"""Ctrl-C in a training run: one saves a checkpoint after the step and stops; a second one stops at once."""

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any

from transformers import TrainerCallback


class StopAfterStep(TrainerCallback):
    """Stops the trainer after the step in which Ctrl-C was pressed, with a checkpoint."""

    def __init__(self) -> None:
        self.asked = False

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Take the first Ctrl-C in this block as the wish to stop; outside the main thread none can be taken."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.getsignal(signal.SIGINT)

        def ask(*_: Any) -> None:
            self.asked = True
            signal.signal(signal.SIGINT, before)
            print("\nstopping after this step; Ctrl-C again stops at once, without a checkpoint", file=sys.stderr)

        signal.signal(signal.SIGINT, ask)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.asked:
            control.should_save = control.should_training_stop = True
