"""Runs a command that stops itself at a point the test chooses, so that it can be killed in a known state."""

import os
import signal
import subprocess

import psutil

_PROGRAM = """
import os, runpy, signal
import {module} as module
whole = module.{method}
def watched(self, *given, **named):
    result = whole(self, *given, **named)
    if {when}:
        os.kill(os.getpid(), signal.SIGSTOP)
    return result
module.{method} = watched
runpy.run_module({package!r}, run_name="__main__", alter_sys=True)
"""


def stopping(package: str, module: str, method: str, when: str) -> str:
    """A program for `python -c`: runs `python -m package` and stops after the first call of `method` with `when` true.

    when: an expression of the call's `self`, `given` (other positional arguments) and `named`.
    """
    return _PROGRAM.format(package=package, module=module, method=method, when=when)


def kill_when_stopped(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """Wait until the command has stopped, kill it with -9, and return its child processes."""
    _, status = os.waitpid(process.pid, os.WUNTRACED)
    assert os.WIFSTOPPED(status), process.communicate()
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    return children
