"""Checks of the folders that a run writes to."""

import os
import shutil
from pathlib import Path

from counsel.errors import UserError

MIN_FREE_DISK_BYTES = 2 << 30


def check_disk(runs: Path) -> str:
    """The run's folder can be written, and its disk has at least 2 GiB free."""
    check_writable("runs", runs)
    free = shutil.disk_usage(_nearest_folder(runs)).free
    if free < MIN_FREE_DISK_BYTES:
        raise UserError(
            f"{free / 2**30:.1f} GiB free at {str(runs)!r}; a run needs {MIN_FREE_DISK_BYTES >> 30} GiB: free some "
            "space, or choose another --runs"
        )
    return f"{free / 2**30:.1f} GiB free"


def check_writable(option_name: str, folder: Path) -> str:
    """`folder` is a folder in which files can be made, or can become one. Raises UserError that names the option."""
    existing = _nearest_folder(folder)
    if not existing.is_dir():
        raise UserError(f"{option_name} is {str(folder)!r}, but {str(existing)!r} is a file; give a folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"{option_name} is {str(folder)!r}, but {str(existing)!r} is not writable; change its "
                        "permissions, or give another folder")  # fmt: skip
    return f"{str(folder)!r} is writable"


def _nearest_folder(path: Path) -> Path:
    """`path`, or its nearest parent that exists."""
    absolute = path.absolute()
    return next(place for place in (absolute, *absolute.parents) if os.path.lexists(place))
