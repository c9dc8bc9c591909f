"""What is known of one published version: its folder's manifest.json, whose keys docs/architecture.md explains."""

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
    """What is known of one version; `prompt["system"]` is the system text to use where a request brings none.

    `trial`: see counsel.trial.Trial; None for a version that was published before there were any.
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
        """The exact served name: `name@version`."""
        return f"{self.name}@{self.version}"

    @property
    def n_bytes(self) -> int:
        return sum(int(file["bytes"]) for file in self.files.values())


def read_manifest(store: Path, name: str, version: str) -> Manifest:
    """The manifest of one version. Raises UserError when it is absent, of another format, or not about itself."""
    path = store / name / version / MANIFEST
    document = read_json(path)
    try:
        manifest = Manifest(**document)
    except TypeError as error:
        raise UserError(f"{str(path)!r} is no adapter manifest: {error}") from error
    files, trial_kept = manifest.files, manifest.trial
    fits = {
        "base": _holds(manifest.base, str) and {"name", "hub_id", "fingerprint"} <= manifest.base.keys(),
        "rank": isinstance(manifest.rank, int),
        "alpha": isinstance(manifest.alpha, int | float),
        "target_modules": isinstance(manifest.target_modules, list),
        "files": _holds(files, dict) and all(_is_file(name, file) for name, file in files.items()),
        "prompt": _holds(manifest.prompt, str) and "system" in manifest.prompt,
        "created_utc": isinstance(manifest.created_utc, str),
        "run": manifest.run is None or isinstance(manifest.run, str),
        "trial": trial_kept is None
        or (_holds(trial_kept, list) and {"tokens", "base", "adapter"} <= trial_kept.keys()),
    }
    if wrong := [key for key, good in fits.items() if not good]:
        raise UserError(f"{str(path)!r} is no adapter manifest: {wrong[0]} is {getattr(manifest, wrong[0])!r}")
    if (manifest.format, manifest.name, manifest.version) != (FORMAT, name, version):
        raise UserError(f"{str(path)!r} describes {manifest.id} in format {manifest.format}; publish the adapter again")
    return manifest


def _holds(value: object, kind: type) -> bool:
    return isinstance(value, dict) and all(isinstance(entry, kind) for entry in value.values())


def _is_file(name: str, file: dict[str, Any]) -> bool:
    known = name in (WEIGHTS, CONFIG, CARD)
    return known and isinstance(file.get("sha256"), str) and isinstance(file.get("bytes"), int)
