"""The parent of a fleet: starts the replicas and the front, keeps them running, and keeps the map of homes.

It is not on the path of any request: while it is stopped, the front and the replicas go on with the homes they have.

In `<logs>/<port>/`: `front.log` (HAProxy's), `r1.log` ... (what each replica's command prints), `haproxy.cfg`,
`homes.map`, `haproxy.sock`, `preload/r1` ... (what each replica loads ahead of requests), `targets.json` (for
Prometheus), and `fleet.json`, which `fleet status` reads.
"""

import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from counsel.errors import UserError
from counsel.files import write_json, write_text
from counsel.store import AdapterVersions
from serve.config import DEFAULT_MAX_CPU_LORAS
from serve.connections import per_address
from serve.fleet import haproxy
from serve.fleet.config import FleetConfig, preload_file
from serve.fleet.front import HOMES, LEAVING, SOCKET, Front, haproxy_config, map_lines
from serve.fleet.home_keeper import HomeKeeper
from serve.fleet.homes import Place
from serve.fleet.process import Kept
from serve.fleet.replicas import SERVE, Replica, ask_all, replicas_of
from serve.server import STOP_S, require_keys, reserve_port
from serve.store_reader import StoreReader
from serve.supervise import reap_orphans

# How long a replica that is down keeps its homes: it comes back with them loaded, and nothing moves twice.
GONE_S = 300.0
# Room for health checks beside what one address may have at a replica.
_SPARE_CONNECTIONS = 24
_BACKLOG = 4096
CONFIG, STATE, TARGETS = "haproxy.cfg", "fleet.json", "targets.json"


class Fleet:
    """A front and its replicas. Entering starts them, `turn` does what is due, leaving stops them."""

    def __init__(self, config: FleetConfig, serve: tuple[str, ...] = SERVE) -> None:
        """serve: the command of a replica. Raises UserError without keys, without HAProxy, or with a port in use."""
        require_keys(config)
        program = haproxy.find_haproxy(config.haproxy)
        self._port = reserve_port(config.host, config.port)
        port = int(self._port.getsockname()[1])
        self.config = config.on(port)
        self.folder = self.config.log_dir
        self.folder.mkdir(parents=True, exist_ok=True)
        self.replicas = replicas_of(self.config, self.folder, serve)
        listener = self._port.fileno()
        write_text(self.folder / CONFIG, front_config(self.config, self.replicas, listener))
        self._lines: dict[str, str] = {}
        self._write_lines()
        haproxy.refuse_bad_config(program, self.folder, CONFIG, (listener,))
        command = program, "-db", "-f", CONFIG
        self.front = Kept(command, self.folder / "front.log", signal.SIGUSR1, self.folder, (listener,))
        self.haproxy = haproxy.Running(self.folder)
        self._store = StoreReader(Path(config.store))
        self._published: dict[str, AdapterVersions] = {}
        self._servers: dict[str, haproxy.ServerState] = {}
        self._homes = HomeKeeper(self.config.home_bound)
        self._seen_s = {replica.name: time.monotonic() for replica in self.replicas}
        self._to_start = [replica for replica in self.replicas if replica.kept]
        self._to_restart: list[str] = []
        self._restarting: tuple[str, int] | None = None
        self._written: dict[str, Any] = {}
        self._any_was_up = not self._to_start
        self._pool = ThreadPoolExecutor(max_workers=min(32, len(self.replicas)), thread_name_prefix="fleet")

    @property
    def base_url(self) -> str:
        """The base URL for an openai client, with `/v1`."""
        host = "127.0.0.1" if self.config.host == "0.0.0.0" else self.config.host
        return f"http://[{host}]:{self.config.port}/v1" if ":" in host else f"http://{host}:{self.config.port}/v1"

    def __enter__(self) -> "Fleet":
        with contextlib.ExitStack() as undo:
            undo.callback(self.stop)
            (self.folder / SOCKET).unlink(missing_ok=True)
            self._write_targets()
            # So that the first start already loads what will be asked there.
            self._published |= self._store.changes(self._published)
            self._choose(self._places(), {})
            # Here, not in HAProxy: while that is started again, connections wait instead of being refused.
            self._port.listen(_BACKLOG)
            self.front.start()
            undo.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def turn(self) -> None:
        """Start what is to be started, look at everything, and set the homes. Raises UserError if nothing can start."""
        if os.getpid() == 1:
            reap_orphans({kept.pid for kept in self._programs() if kept.pid})
        self._keep_running()
        ask_all(self.replicas, self._pool)
        self._published |= self._store.changes(self._published)
        self._published = {name: adapter for name, adapter in self._published.items() if adapter.versions}
        # While HAProxy starts again, everything stays as it was.
        with contextlib.suppress(OSError):
            self._servers = self.haproxy.servers()
            self._homes.measure(self.haproxy.traffic())
            self._set_homes()
        self._restart_next()
        self._write_state()

    def _set_homes(self) -> None:
        """Choose the homes by what is up, and tell the front."""
        if any(state.status == "INI" for state in self._servers.values()):
            # A front that has just started does not know yet who is up; the homes that it has are good.
            return
        places = self._places()
        up = {name: place for name, place in places.items() if self._is_up(name)}
        self._any_was_up = self._any_was_up or bool(up)
        if up:
            self._choose(places, up)
            self._tell(up)

    def restart_all(self) -> None:
        """Start the replicas again one after the other; each leaves first, and the next waits until it is back."""
        self._to_restart = [replica.name for replica in self.replicas if replica.kept]

    def leave(self) -> None:
        """Report on the front's `/ready` that it is about to stop, and go on for `leave_s`."""
        before, self._lines = self._lines, {**self._lines, LEAVING: "yes"}
        with contextlib.suppress(OSError):
            self.haproxy.change_map(before, self._lines)
            time.sleep(self.config.leave_s)

    def stop(self) -> None:
        """Let the front finish what runs, then stop the replicas."""
        self._port.close()
        self._pool.shutdown(wait=False)
        programs = [replica.kept for replica in self.replicas if replica.kept]
        try:
            self.front.signal(signal.SIGUSR1)
            self.front.wait(self.config.drain_s + STOP_S)
            for kept in programs:
                kept.signal(signal.SIGINT)
            for kept in programs:
                kept.wait(self.config.drain_s + 2 * STOP_S)
        finally:
            for kept in (self.front, *programs):
                kept.wait(0)
            for replica in self.replicas:
                for held in replica.reserved:
                    held.close()
            (self.folder / STATE).unlink(missing_ok=True)

    def _programs(self) -> Iterator[Kept]:
        yield self.front
        yield from (replica.kept for replica in self.replicas if replica.kept)

    def _keep_running(self) -> None:
        """Start the next replica once the one before is up, and again what ended."""
        started = [replica for replica in self.replicas if replica.kept and replica not in self._to_start]
        # One after the other: starting takes all cores, and together each would take as long as all.
        if self._to_start and (not started or self._is_up(started[-1].name) or started[-1].kept.restarts):  # type: ignore[union-attr]
            following = self._to_start.pop(0)
            assert following.kept is not None
            _say(f"starting {following.name} on http://{following.address} (log: {following.kept.log})")
            following.kept.start()
        for name, kept in (("the front", self.front), *((r.name, r.kept) for r in started if r.kept)):
            if reason := kept.turn():
                if not self._any_was_up:
                    raise UserError(f"{name} did not start: {reason} (log: {kept.log})")
                _say(f"{name} ended: {reason}; starting it again")

    def _restart_next(self) -> None:
        if self._restarting:
            name, before = self._restarting
            kept = next(replica.kept for replica in self.replicas if replica.name == name)
            if kept is None or kept.restarts == before or not self._is_up(name):
                return
            _say(f"{name} is back")
            self._restarting = None
        if self._to_restart:
            name = self._to_restart.pop(0)
            kept = next(replica.kept for replica in self.replicas if replica.name == name)
            if kept is not None:
                _say(f"restarting {name}")
                self._restarting = name, kept.restarts
                kept.signal(signal.SIGTERM)

    def _is_up(self, name: str) -> bool:
        state = self._servers.get(name)
        return state is not None and state.status == "UP"

    def _places(self) -> dict[str, Place]:
        """The replicas that may have homes: those that are up, and those that were until a short while ago."""
        current, now_s = self._current(), time.monotonic()
        self._seen_s |= {replica.name: now_s for replica in self.replicas if self._is_up(replica.name)}
        expected = [replica for replica in self.replicas if now_s - self._seen_s[replica.name] < GONE_S]
        capacity = self.config.max_cpu_loras or DEFAULT_MAX_CPU_LORAS
        return {replica.name: replica.place(capacity, current) for replica in expected}

    def _current(self) -> dict[str, str]:
        return {name: f"{name}@{adapter.current}" for name, adapter in self._published.items() if adapter.current}

    def _ranks(self) -> dict[str, int]:
        return {
            name: adapter.versions[adapter.current].rank for name, adapter in self._published.items() if adapter.current
        }

    def _choose(self, places: dict[str, Place], up: dict[str, Place]) -> None:
        """Choose the homes, and list for each replica what it shall load ahead of requests."""
        before = self._homes.preloads
        self._homes.choose(self._ranks(), places, up, time.monotonic())
        for name, listed in self._homes.preloads.items():
            if listed != before.get(name):
                write_text(preload_file(self.folder, name), "".join(f"{adapter}\n" for adapter in listed))

    def _tell(self, up: dict[str, Place]) -> None:
        """Tell HAProxy the homes that are ready."""
        told = self._homes.tell(self._ranks(), up, time.monotonic())
        refused = {name for place in up.values() for name in place.refused}
        lines: dict[str, str] = {}
        for name, at in told.items():
            lines |= map_lines(name, at, only=name in refused)
        if lines == self._lines:
            return
        before, self._lines = self._lines, lines
        # The file first: HAProxy reads it if it is started again now.
        self._write_lines()
        self.haproxy.change_map(before, lines)

    def _write_lines(self) -> None:
        write_text(self.folder / HOMES, "".join(f"{key} {value}\n" for key, value in self._lines.items()))

    def _write_targets(self) -> None:
        """What Prometheus scrapes, as its `file_sd_configs` reads it; only where it has a port without keys."""
        if not self.config.metrics_port:
            return
        front = f"{self.config.metrics_host}:{self.config.metrics_port}"
        rows: list[dict[str, Any]] = [{"targets": [front], "labels": {"job": "counsel-front"}}]
        rows += [
            {"targets": [replica.private], "labels": {"job": "counsel-replica", "replica": replica.name}}
            for replica in self.replicas
        ]
        write_text(self.folder / TARGETS, json.dumps(rows, indent=2) + "\n")

    def _write_state(self) -> None:
        current = self._current()
        document = {
            "pid": os.getpid(),
            "url": self.base_url,
            "front_pid": self.front.pid,
            "store": str(Path(self.config.store).absolute()),
            "replicas": {
                replica.name: {
                    "url": f"http://{replica.address}",
                    "private": replica.private,
                    "pid": replica.kept.pid if replica.kept else None,
                    "restarts": replica.kept.restarts if replica.kept else None,
                    "ended": replica.kept.ended if replica.kept else "",
                    "loaded": None
                    if replica.adapters is None
                    else sum(r["state"] == "loaded" for r in replica.adapters),
                    "refused": replica.refusals(current),
                }
                for replica in self.replicas
            },
            "homes": {name: list(at) for name, at in self._homes.told.items()},
        }
        if document != self._written:
            self._written = document
            write_json(self.folder / STATE, document)


def front_config(config: FleetConfig, replicas: list[Replica], listener: int | None = None) -> str:
    """The text of HAProxy's configuration. listener: see Front."""
    front = Front(
        host=config.host,
        port=config.port,
        home_bound=config.home_bound,
        key_in_flight=config.key_in_flight,
        metrics_host=config.metrics_host,
        metrics_port=config.metrics_port,
        replica_connections=per_address(config.queued) - _SPARE_CONNECTIONS,
        stop_s=config.drain_s,
        traces=bool(config.otlp_traces_endpoint),
        listener=listener,
    )
    return haproxy_config(front, {replica.name: replica.address for replica in replicas})


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
