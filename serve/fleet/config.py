"""`FleetConfig`: the schema of `python -m serve fleet`. Every option of a server is an option of each replica."""

import dataclasses
import urllib.parse
from dataclasses import dataclass
from pathlib import Path

from counsel.cli import option
from counsel.errors import UserError
from counsel.values import NonNegativeInt, PositiveInt
from serve.config import ServeConfig

_FLEET = "fleet"
DEFAULT_REPLICAS = 2
DEFAULT_HOME_IN_FLIGHT = 32


@dataclass(frozen=True)
class FleetConfig(ServeConfig):
    """A front on `host` and `port`, and its replicas: servers that this command starts, or that run elsewhere."""

    replicas: NonNegativeInt | None = option(
        None,
        "servers to start on this machine",
        group=_FLEET,
        shown=f"{DEFAULT_REPLICAS}, or 0 with --replica-urls",
    )
    replica_urls: tuple[str, ...] = option(
        (),
        "servers that run elsewhere on the same store and keys, comma-separated",
        group=_FLEET,
        metavar="URL,...",
        shown="none",
    )
    home_in_flight: PositiveInt | None = option(
        None,
        "requests in flight at an adapter's home above which its further requests go to the least busy replica",
        group=_FLEET,
        shown=f"--max-num-seqs, or {DEFAULT_HOME_IN_FLIGHT}",
    )
    key_in_flight: NonNegativeInt = option(
        0, "requests in flight per key over all replicas; further ones get status 429; 0: no total", group=_FLEET
    )
    haproxy: str = option(
        "", "HAProxy 2.8 or later", group=_FLEET, metavar="FILE", shown="of the extra `fleet`, or on PATH"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for url in self.replica_urls:
            parts = urllib.parse.urlsplit(url)
            try:
                usable = (
                    parts.scheme == "http" and parts.hostname and parts.port and parts.path.rstrip("/") in ("", "/v1")
                )
            except ValueError:
                usable = False
            if not usable:
                raise UserError(f"replica_urls has {url!r}; each must be like http://10.0.0.5:8000")
        if not self.n_local and not self.replica_urls:
            raise UserError("replicas is 0 and replica_urls is empty; a fleet needs at least one replica")

    @property
    def n_local(self) -> int:
        """Replicas that are started on this machine."""
        if self.replicas is None:
            return 0 if self.replica_urls else DEFAULT_REPLICAS
        return self.replicas

    @property
    def home_bound(self) -> int:
        """Requests in flight at a home above which an adapter's further requests go elsewhere."""
        return self.home_in_flight or self.max_num_seqs or DEFAULT_HOME_IN_FLIGHT

    def on(self, port: int) -> "FleetConfig":
        """This config with the port that was taken, and logs at an absolute path."""
        return dataclasses.replace(self, port=port, logs=str(Path(self.logs).absolute()))

    def replica(self, name: str, port: int, metrics_host: str, metrics_port: int) -> ServeConfig:
        """The config of a replica on this machine."""
        shared = {field.name: getattr(self, field.name) for field in dataclasses.fields(ServeConfig)}
        own = {"host": "127.0.0.1", "port": port, "metrics_host": metrics_host, "metrics_port": metrics_port}
        files = {"logs": str(self.log_dir), "preload": str(preload_file(self.log_dir, name))}
        return ServeConfig(**{**shared, **own, **files})


def preload_file(folder: Path, name: str) -> Path:
    """The file in which a fleet lists the adapters that a replica shall hold ready."""
    return folder.absolute() / "preload" / name
