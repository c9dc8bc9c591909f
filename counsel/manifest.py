"""The manifest.json of a published version; docs/architecture.md explains its keys."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from counsel.adapter_check import CARD, CONFIG, WEIGHTS
from counsel.errors import UserError
from counsel.files import read_json

FORMAT = 1
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Manifest:
    """One version of an adapter.

    prompt: its "system" is the system text for requests without one.
    trial: see counsel.trial.Trial; None for a version published before trials existed.
    """

    format: int
    name: str
    version: str
    created_utc: str
    base: dict[str, str]
    rank: int
    alpha: float
    target_modules: list[str]
    files: dict[str, dict[str, Any]]
    prompt: dict[str, str]
    run: str | None
    trial: dict[str, list[float]] | None = None

    @property
    def id(self) -> str:
        """The exact served name, `name@version`."""
        return f"{self.name}@{self.version}"

    @property
    def n_bytes(self) -> int:
        return sum(int(file["bytes"]) for file in self.files.values())


def read_manifest(store: Path, name: str, version: str) -> Manifest:
    """The manifest of one version. Raises UserError when it is absent, broken, in another format or misplaced."""
    path = store / name / version / MANIFEST
    document = read_json(path)
    if (written := document.get("format")) != FORMAT:
        raise UserError(
            f"{str(path)!r} has format {written!r}, but this version of Counsel Stack reads format {FORMAT}; "
            "publish the adapter again"
        )
    try:
        manifest = Manifest(**document)
    except TypeError as error:
        raise UserError(f"{str(path)!r} is not an adapter manifest: {error}; publish the adapter again") from error
    files, trial = manifest.files, manifest.trial
    valid = {
        "base": _holds(manifest.base, str) and {"name", "hub_id", "fingerprint"} <= manifest.base.keys(),
        "rank": isinstance(manifest.rank, int),
        "alpha": isinstance(manifest.alpha, int | float),
        "target_modules": isinstance(manifest.target_modules, list),
        "files": _holds(files, dict) and all(_is_file(name, file) for name, file in files.items()),
        "prompt": _holds(manifest.prompt, str) and "system" in manifest.prompt,
        "created_utc": isinstance(manifest.created_utc, str),
        "run": manifest.run is None or isinstance(manifest.run, str),
        "trial": trial is None or (_holds(trial, list) and {"tokens", "base", "adapter"} <= trial.keys()),
    }
    if invalid := [key for key, is_valid in valid.items() if not is_valid]:
        raise UserError(
            f"{str(path)!r} is not an adapter manifest: {invalid[0]} is {getattr(manifest, invalid[0])!r}; "
            "publish the adapter again"
        )
    if (manifest.name, manifest.version) != (name, version):
        raise UserError(f"{str(path)!r} describes {manifest.id}, not {name}@{version}; publish the adapter again")
    return manifest


def _holds(value: object, kind: type) -> bool:
    return isinstance(value, dict) and all(isinstance(entry, kind) for entry in value.values())


def _is_file(name: str, file: dict[str, Any]) -> bool:
    known = name in (WEIGHTS, CONFIG, CARD)
    return known and isinstance(file.get("sha256"), str) and isinstance(file.get("bytes"), int)
