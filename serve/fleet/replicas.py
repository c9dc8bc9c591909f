"""The replicas of a fleet: how each is started and asked, and what it says it has loaded and cannot serve."""

import http.client
import json
import signal
import socket
import sys
import urllib.parse
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from counsel.files import write_json
from serve.fleet.config import FleetConfig
from serve.fleet.homes import Place
from serve.fleet.process import Kept
from serve.server import reserve_port

_ASK_S = 2.0
SERVE = (sys.executable, "-m", "serve")


@dataclass
class Replica:
    """One server. address: `host:port`. private: where `/v1/adapters` needs no key; empty if the fleet does not know.

    kept: the process, of a replica on this machine. adapters: what `/v1/adapters` said last; None if it did not answer.
    """

    name: str
    address: str
    private: str
    kept: Kept | None = None
    adapters: list[dict[str, Any]] | None = None
    reserved: list[socket.socket] = field(default_factory=list, repr=False)

    def place(self, places: int, current: Mapping[str, str]) -> Place:
        """What it has loaded and refuses. current: name -> the id of the version that the store calls current."""
        if self.adapters is None:
            return Place(places, loaded=None)
        of = {row["id"]: row for row in self.adapters}
        known = {name: of[served_id] for name, served_id in current.items() if served_id in of}
        return Place(
            places,
            loaded=frozenset(name for name, row in known.items() if row["state"] == "loaded"),
            refused=frozenset(name for name, row in known.items() if row["reason"]),
        )

    def refusals(self, current: Mapping[str, str]) -> dict[str, str]:
        """The current versions that it cannot serve -> why."""
        wanted = set(current.values())
        return {row["id"]: row["reason"] for row in self.adapters or () if row["reason"] and row["id"] in wanted}


def replicas_of(config: FleetConfig, folder: Path, serve: tuple[str, ...] = SERVE) -> list[Replica]:
    """The replicas on this machine, not started yet, then those elsewhere. `r1`, `r2` ... are their names."""
    replicas = []
    for number in range(1, config.n_local + 1):
        name = f"r{number}"
        metrics_host = config.metrics_host if config.metrics_port else "127.0.0.1"
        metrics_port = config.metrics_port + number if config.metrics_port else 0
        # Held as long as the fleet lives, so that no other program gets a replica's port while it starts again.
        reserved = [reserve_port("127.0.0.1", 0), reserve_port(metrics_host, metrics_port)]
        port, metrics_port = (int(held.getsockname()[1]) for held in reserved)
        own = config.replica(name, port, metrics_host, metrics_port)
        write_json(folder / f"{name}.json", asdict(own))
        kept = Kept((*serve, "--config", str(folder / f"{name}.json")), folder / f"{name}.log", signal.SIGTERM)
        private = f"{_in_url(metrics_host)}:{metrics_port}"
        replicas.append(Replica(name, f"127.0.0.1:{port}", private, kept, reserved=reserved))
    return [*replicas, *replicas_elsewhere(config)]


def replicas_elsewhere(config: FleetConfig) -> list[Replica]:
    """The replicas of `replica_urls`; where the fleet has a metrics port, so have they."""
    replicas = []
    for number, url in enumerate(config.replica_urls, start=config.n_local + 1):
        parts = urllib.parse.urlsplit(url)
        host = _in_url(parts.hostname or "")
        private = f"{host}:{config.metrics_port}" if config.metrics_port else ""
        replicas.append(Replica(f"r{number}", f"{host}:{parts.port}", private))
    return replicas


def ask_all(replicas: list[Replica], pool: ThreadPoolExecutor) -> None:
    """Ask each replica what it has loaded."""
    for replica, adapters in zip(replicas, pool.map(_adapters, replicas), strict=True):
        replica.adapters = adapters


def _adapters(replica: Replica) -> list[dict[str, Any]] | None:
    if not replica.private:
        return None
    connection = http.client.HTTPConnection(replica.private, timeout=_ASK_S)
    try:
        connection.request("GET", "/v1/adapters")
        reply = connection.getresponse()
        return list(json.loads(reply.read())["data"]) if reply.status == 200 else None
    except (OSError, http.client.HTTPException, ValueError, KeyError):
        return None
    finally:
        connection.close()


def _in_url(host: str) -> str:
    return f"[{host}]" if ":" in host else host
