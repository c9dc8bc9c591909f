"""`python -m serve fleet`, `fleet status` and `fleet config`."""

import contextlib
import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Ge, Le

from counsel.cli import Result, as_typed, option
from counsel.errors import UserError
from counsel.files import read_json, write_text
from counsel.report.tables import text_table
from serve.fleet import haproxy
from serve.fleet.config import FleetConfig
from serve.fleet.fleet import CONFIG, STATE, Fleet, front_config
from serve.fleet.front import HOMES
from serve.fleet.home_keeper import TURN_S
from serve.fleet.replicas import replicas_elsewhere
from serve.supervise import Terminated, raise_terminated


@dataclass(frozen=True)
class FleetFolder:
    """Which running fleet is meant."""

    port: Annotated[int, Ge(1), Le(65535)] = option(8000, "port of the fleet's front")
    logs: str = option("runs/serve", "the fleet's --logs", metavar="FOLDER")

    @property
    def folder(self) -> Path:
        return Path(self.logs) / str(self.port)


@dataclass(frozen=True)
class FrontConfig(FleetConfig):
    """A front's configuration, printed or written."""

    output: str = option(
        "",
        "write it to this file, with an empty map of homes beside it",
        group="output",
        metavar="FILE",
        shown="print it",
    )


def serve_fleet(config: FleetConfig) -> Result:
    """Serve until Ctrl-C or SIGTERM; start again what dies. SIGHUP restarts the replicas one after the other."""
    signal.signal(signal.SIGTERM, raise_terminated)
    fleet = Fleet(config)
    signal.signal(signal.SIGHUP, lambda number, frame: fleet.restart_all())
    print(_welcome(fleet), file=sys.stderr, flush=True)
    try:
        with fleet:
            try:
                while True:
                    fleet.turn()
                    time.sleep(TURN_S)
            except KeyboardInterrupt as signalled:
                print("stopping: running requests may finish first", file=sys.stderr, flush=True)
                if isinstance(signalled, Terminated):
                    fleet.leave()
    except KeyboardInterrupt:
        print("stopped at once", file=sys.stderr, flush=True)
        raise
    return Result({"base_url": fleet.base_url, "replicas": len(fleet.replicas), "logs": str(fleet.folder)})


def show_status(options: FleetFolder) -> Result:
    """Show the replicas, their health and load, the homes, and what a replica cannot serve."""
    fleet = _running(options.folder)
    try:
        running = haproxy.Running(options.folder)
        servers, traffic = running.servers(), running.traffic()
    except OSError as error:
        raise UserError(
            f"the front of {fleet['url']} does not answer ({error.strerror}); see {options.folder}/front.log"
        ) from error
    n_homes = {name: sum(name in at for at in fleet["homes"].values()) for name in fleet["replicas"]}
    rows = []
    for name, replica in fleet["replicas"].items():
        state = servers[name]
        shown = "up" if state.status == "UP" else f"down ({replica['ended'] or state.check or 'not ready'})"
        loaded = "?" if replica["loaded"] is None else str(replica["loaded"])
        rows.append((name, replica["url"], shown, str(state.in_flight), str(state.requests), str(n_homes[name]), loaded,
                     "-" if replica["restarts"] is None else str(replica["restarts"]),
                     "-" if replica["pid"] is None else str(replica["pid"])))  # fmt: skip
    print(
        text_table([("replica", "url", "health", "in flight", "requests", "homes", "loaded", "restarts", "pid"), *rows])
    )
    print()
    adapters = sorted(fleet["homes"], key=lambda name: (-(traffic[name].per_minute if name in traffic else 0), name))
    busiest = [
        (name, " ".join(fleet["homes"][name]), str(traffic[name].in_flight if name in traffic else 0),
         str(traffic[name].per_minute if name in traffic else 0))
        for name in adapters
    ]  # fmt: skip
    if busiest:
        print(text_table([("adapter", "homes", "in flight", "requests in the last minute"), *busiest]))
    refused = [
        {"replica": name, "adapter": served_id, "reason": reason}
        for name, replica in fleet["replicas"].items()
        for served_id, reason in replica["refused"].items()
    ]
    for row in refused:
        print(f"{row['replica']} does not serve {row['adapter']}: {row['reason']}; no request for it goes there")
    document: dict[str, Any] = {
        "url": fleet["url"],
        "pid": fleet["pid"],
        "replicas": {
            name: {
                "up": servers[name].status == "UP", "in_flight": servers[name].in_flight,
                "requests": servers[name].requests, "homes": n_homes[name], **replica,
            }
            for name, replica in fleet["replicas"].items()
        },
        "homes": fleet["homes"],
        "refused": refused,
    }  # fmt: skip
    return Result(document)


def show_config(config: FrontConfig) -> Result:
    """Print the HAProxy configuration of the fleet that runs on this port, or of a front for --replica-urls."""
    folder = config.log_dir
    if config.replica_urls:
        if config.n_local:
            raise UserError(
                f"replicas is {config.n_local}: the ports of replicas on this machine are known once they run"
            )
        text = front_config(config, replicas_elsewhere(config))
    else:
        _running(folder)
        text = (folder / CONFIG).read_text(encoding="utf-8")
    if not config.output:
        print(text, end="")
        return Result({"port": config.port})
    output = Path(config.output)
    write_text(output, text)
    if not (output.parent / HOMES).exists():
        write_text(output.parent / HOMES, "")
    return Result({"port": config.port, "config": config.output}, next=f"cd {output.parent}; haproxy -f {output.name}")


def _running(folder: Path) -> dict[str, Any]:
    """What a running fleet says about itself. Raises UserError where none runs."""
    with contextlib.suppress(UserError, OSError):
        fleet = read_json(folder / STATE)
        os.kill(fleet["pid"], 0)
        return fleet
    raise UserError(f"no fleet runs with its files in {folder}/; name the front's port with --port, and its --logs")


def _welcome(fleet: Fleet) -> str:
    where = fleet.folder
    return "\n".join(
        (
            f"front    {fleet.base_url} before {', '.join(f'{r.name} http://{r.address}' for r in fleet.replicas)}",
            as_typed(f"status   python -m serve fleet status --port {fleet.config.port} (files: {where})"),
            "stop     Ctrl-C",
        )
    )
