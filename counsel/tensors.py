"""What a safetensors file holds, from its header alone."""

import json
import struct
from pathlib import Path

from counsel.errors import UserError

Shape = tuple[int, ...]
MAX_HEADER_BYTES = 100 << 20


def tensor_shapes(path: Path) -> dict[str, Shape]:
    """The name and shape of every tensor in a safetensors file, from its header alone."""
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > MAX_HEADER_BYTES:
                raise ValueError("its header is larger than 100 MB")
            header = json.loads(file.read(length))
        return {name: tuple(entry["shape"]) for name, entry in header.items() if name != "__metadata__"}
    except OSError as error:
        raise UserError(f"cannot read {str(path)!r}: {error.strerror}") from error
    except (struct.error, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{str(path)!r} is not a whole safetensors file ({error}); save the adapter again") from error
