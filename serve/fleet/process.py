"""A program that a fleet keeps running: started, watched, started again after growing pauses, stopped."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from serve.supervise import FIRST_PAUSE_S, LONGEST_PAUSE_S, WINDOW_S

# The kernel sends the signal when the process that started the program ends, however it ends. Ctrl-C works again also
# where the fleet was started in the background by a shell, which ignores it there.
_PR_SET_PDEATHSIG = 1
_TIED = (
    "import ctypes, os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); "
    "ctypes.CDLL(None).prctl({option}, {number}); "
    "os.getppid() == {parent} or sys.exit(1); os.execv(sys.argv[1], sys.argv[1:])"
)


class Kept:
    """One program. `turn` does what is due; nothing here waits."""

    def __init__(
        self, command: Sequence[str], log: Path, orphaned: signal.Signals, cwd: Path | None = None,
        inherits: Sequence[int] = (),
    ) -> None:  # fmt: skip
        """command: the program's absolute path and its arguments. orphaned: its signal when this process ends.

        inherits: file descriptors of this process that it gets under the same numbers.
        """
        self.command, self.log, self.orphaned, self.cwd, self.inherits = command, log, orphaned, cwd, inherits
        self.process: subprocess.Popen[bytes] | None = None
        self.restarts = 0
        self.ended = ""
        self._failures_s: list[float] = []
        self._start_at_s = 0.0

    @property
    def pid(self) -> int | None:
        """The process's id; None while it does not run."""
        return self.process.pid if self.process and self.process.returncode is None else None

    def start(self) -> None:
        """Start the program. Only for the main thread: the program ends with the thread that started it."""
        tied = _TIED.format(option=_PR_SET_PDEATHSIG, number=int(self.orphaned), parent=os.getpid())
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", tied, *self.command],
                cwd=self.cwd,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                # Ctrl-C reaches the fleet only, which stops its programs in order.
                start_new_session=True,
                pass_fds=self.inherits,
            )

    def turn(self) -> str:
        """Start the program again if it ended and its pause is over; return why it ended, once, else ""."""
        if self.process is None or self.process.poll() is None:
            return ""
        now_s = time.monotonic()
        if not self._start_at_s:
            self._failures_s = [s for s in self._failures_s if now_s - s < WINDOW_S] + [now_s]
            # At once after the first failure: one that was killed is missed by somebody.
            n_before = len(self._failures_s) - 1
            pause_s = min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2 ** (n_before - 1)) if n_before else 0.0
            # What was asked to end, as in a rolling restart, starts again at once.
            self._start_at_s = now_s + (pause_s if self.process.returncode else 0.0)
            self.ended = self._reason()
            return self.ended
        if now_s >= self._start_at_s:
            self._start_at_s = 0.0
            self.restarts += 1
            self.start()
        return ""

    def signal(self, number: signal.Signals) -> None:
        """Send the program a signal, if it runs."""
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(number)

    def wait(self, within_s: float) -> None:
        """Return when the program has ended; kill it after `within_s`."""
        if self.process is None:
            return
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(within_s)
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()

    def _reason(self) -> str:
        """Why it ended: the last error in its log, or its status."""
        assert self.process is not None
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-20:]
        errors = [line for line in lines if line.startswith(("error: ", "[ALERT]"))]
        status = self.process.returncode
        how = f"signal {-status}" if status < 0 else f"exit status {status}"
        return errors[-1].removeprefix("error: ") if errors and status > 0 else how
