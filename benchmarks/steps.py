"""Steps of a long measurement: each writes its row as it ends, and a run that was stopped goes on after the last one.

A stage is a process of its own that runs one or more steps, so that a failure ends one step and not the run. The
parent watches it. A step that ends the process has failed; one that outlasts its limit is killed with all that it
started; the stage then starts again with the steps that are left. Rows are files, `<folder>/<step>.json`:

    step, status (running, done, failed, timed out, not run), seconds, reason (of all but done), figures (of done)

figures has `ok`: true or false where the step is judged, null where it only measures.
"""

import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from counsel.files import read_json, write_json

DONE, RUNNING, FAILED, TIMED_OUT, NOT_RUN = "done", "running", "failed", "timed out", "not run"
POLL_S = 0.1

Figures = dict[str, Any]


class Step(NamedTuple):
    """A step's name, and the longest that it may take."""

    name: str
    limit_s: float


class Stage(NamedTuple):
    """Steps that share a process. set_up_s: the longest that it may take between its steps, and before the first."""

    name: str
    set_up_s: float
    steps: tuple[Step, ...]


class Rows:
    """The rows of a run, one file each, so that no step can damage another's."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def read(self, step: str) -> dict[str, Any] | None:
        path = self.folder / f"{step}.json"
        return read_json(path) if path.is_file() else None

    def write(self, step: str, status: str, seconds: float, reason: str = "", figures: Figures | None = None) -> None:
        row = {"step": step, "status": status, "seconds": round(seconds, 1), "reason": reason}
        write_json(self.folder / f"{step}.json", row | {"figures": figures or {}})

    def forget_unfinished(self, stages: Sequence[Stage]) -> None:
        """Remove the rows of steps that did not end well, so that they run again."""
        for step in (step.name for stage in stages for step in stage.steps):
            row = self.read(step)
            if row and row["status"] != DONE:
                (self.folder / f"{step}.json").unlink()

    def left(self, stage: Stage) -> list[Step]:
        """The steps of a stage that have no row yet."""
        return [step for step in stage.steps if self.read(step.name) is None]

    def running(self, stage: Stage) -> Step | None:
        """The step that runs, or that ran when its process ended."""
        rows = {step: self.read(step.name) for step in stage.steps}
        return next((step for step, row in rows.items() if row and row["status"] == RUNNING), None)

    def run(self, step: str, measure: Callable[[], Figures]) -> None:
        """In the stage's process: run a step unless it has a row, and write its row."""
        if self.read(step) is not None:
            return
        self.write(step, RUNNING, 0.0)
        started_s = time.monotonic()
        figures = measure()
        self.write(step, DONE, time.monotonic() - started_s, figures=figures)


def run_stage(stage: Stage, rows: Rows, argv: Sequence[str], log: Path, deadline_s: float) -> None:
    """Run a stage's process, `argv`, until each of its steps has a row.

    log: gets the process's output; its last line is the reason of a failure. deadline_s: the time, on the monotonic
    clock, at which the whole run ends; steps that did not run by then say so.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    while left := rows.left(stage):
        if time.monotonic() >= deadline_s:
            for step in left:
                rows.write(step.name, NOT_RUN, 0.0, reason="the time was over; the same command goes on from here")
            return
        with log.open("wb") as output:
            process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT)
            try:
                overran = _watch(process, stage, rows, deadline_s)
            finally:
                kill_tree(process)
        if stopped := rows.running(stage):
            status, reason = (TIMED_OUT, overran[1]) if overran else (FAILED, _last_line(log, process.returncode))
            rows.write(stopped.name, status, overran[0] if overran else 0.0, reason=reason)
        elif len(rows.left(stage)) == len(left) and time.monotonic() < deadline_s:
            for step in left:
                reason = overran[1] if overran else _last_line(log, process.returncode)
                rows.write(step.name, FAILED, 0.0, reason=f"before its first step: {reason}")


def _watch(process: subprocess.Popen[bytes], stage: Stage, rows: Rows, deadline_s: float) -> tuple[float, str] | None:
    """Wait for the process; if a limit was reached first, the seconds that the step ran and why it must end."""
    current, since_s = rows.running(stage), time.monotonic()
    while process.poll() is None:
        running, now_s = rows.running(stage), time.monotonic()
        if running != current:
            current, since_s = running, now_s
        limit_s = current.limit_s if current else stage.set_up_s
        if now_s >= deadline_s:
            return now_s - since_s, "the time of the whole run was over"
        if now_s - since_s > limit_s:
            return now_s - since_s, f"longer than its limit of {limit_s:g} s"
        time.sleep(POLL_S)
    return None


def kill_tree(process: subprocess.Popen[bytes]) -> None:
    """Kill the process, if it runs, and everything that it started."""
    if process.poll() is None:
        children = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        for child in children:
            if child.is_running():
                child.kill()
    process.wait()


def _last_line(log: Path, exit_status: int) -> str:
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1][:300] if lines else f"exit status {exit_status}, without a word"
