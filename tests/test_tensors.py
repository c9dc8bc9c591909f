"""Names and shapes from a safetensors header: what is read, and the one-line error for what cannot be."""

import json
import struct
import subprocess
import sys

import pytest

from counsel.errors import UserError
from counsel.tensors import tensor_shapes
from tests.test_layout import ROOT


def header(**tensors: dict[str, object]) -> bytes:
    text = json.dumps(tensors).encode()
    return struct.pack("<Q", len(text)) + text


FLOAT8 = header(w={"dtype": "F8_E4M3", "shape": [4, 2], "data_offsets": [0, 8]})


def test_shapes_are_read_whatever_the_dtype(tmp_path):
    """Also of dtypes that numpy lacks: float8 and bfloat16."""
    both = header(
        a={"dtype": "F8_E5M2", "shape": [4, 2], "data_offsets": [0, 8]},
        b={"dtype": "BF16", "shape": [3], "data_offsets": [8, 14]},
    )
    (tmp_path / "w").write_bytes(both + bytes(14))
    assert tensor_shapes(tmp_path / "w") == {"a": (4, 2), "b": (3,)}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "header too small"),
        (b"not a model, not at all", "header too large"),
        (FLOAT8[:-4], "invalid header length"),
        (FLOAT8 + bytes(5), "incomplete metadata"),
        (FLOAT8 + bytes(9), "incomplete metadata"),
        (struct.pack("<Q", 101 << 20) + b"{", "header too large"),
        (struct.pack("<Q", 200_000) + b"[" * 200_000, "invalid JSON"),
        (header(w={"dtype": "F9", "shape": [1], "data_offsets": [0, 1]}) + b"x", "unknown variant `F9`"),
    ],
    ids=["empty", "text", "cut header", "cut data", "trailing bytes", "giant header", "nested", "unknown dtype"],
)
def test_a_broken_file_is_one_line(tmp_path, content, reason):
    """The line names the file and the reason."""
    (tmp_path / "w").write_bytes(content)
    with pytest.raises(UserError, match=rf"w' is not a complete safetensors file \(.*{reason}") as error:
        tensor_shapes(tmp_path / "w")
    assert "\n" not in str(error.value)


def test_an_absent_file_is_one_line(tmp_path):
    """So is a folder in its place."""
    for path in (tmp_path / "absent", tmp_path):
        with pytest.raises(UserError, match="cannot read"):
            tensor_shapes(path)


def test_reading_shapes_does_not_load_torch(tmp_path):
    """`serve` and `train` check an adapter's shapes before they pay for torch."""
    (tmp_path / "w").write_bytes(FLOAT8 + bytes(8))
    probe = (
        "import sys; from pathlib import Path; from counsel.tensors import tensor_shapes; "
        "print(tensor_shapes(Path(sys.argv[1])), 'torch' in sys.modules)"
    )
    command = [sys.executable, "-c", probe, str(tmp_path / "w")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "{'w': (4, 2)} False", done.stderr
