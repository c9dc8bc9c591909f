"""Ctrl-C in a training run: the first saves a checkpoint after the step and stops, the second stops at once."""

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any

from transformers import TrainerCallback


class StopAfterStep(TrainerCallback):
    """Stops the trainer, with a checkpoint, after the step in which Ctrl-C was pressed."""

    def __init__(self) -> None:
        self.requested = False

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Treat the first Ctrl-C in this block as a request to stop. Only the main thread can handle signals."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.getsignal(signal.SIGINT)

        def request_stop(*_: Any) -> None:
            self.requested = True
            signal.signal(signal.SIGINT, before)
            print("\nstopping after this step; Ctrl-C again stops at once, without a checkpoint", file=sys.stderr)

        signal.signal(signal.SIGINT, request_stop)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.requested:
            control.should_save = control.should_training_stop = True
