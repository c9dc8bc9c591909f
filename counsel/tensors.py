"""The names and shapes in a safetensors file, read from its header alone."""

from pathlib import Path

from safetensors import SafetensorError, safe_open

from counsel.errors import UserError

Shape = tuple[int, ...]


def tensor_shapes(path: Path) -> dict[str, Shape]:
    """The name and shape of every tensor in a safetensors file. Raises UserError when it is absent or broken."""
    try:
        # "np" loads numpy (a tenth of a second), "pt" torch (seconds). No tensor is read, so any dtype will do.
        with safe_open(path, framework="np") as tensors:
            return {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    except OSError as error:
        raise UserError(f"cannot read {str(path)!r}: {error.strerror or error}") from error
    except SafetensorError as error:
        raise UserError(
            f"{str(path)!r} is not a complete safetensors file ({error}); save or download it again"
        ) from error
