"""Solve pyproject.toml into locks/cpu.txt and locks/cuda.txt, for every Python and machine that it names: `make lock`.

Both are solved against PyPI alone. Folders of local wheels are left out: beside one that holds a CPU build of torch,
the CUDA lock would pin that build. PyPI's torch is the CUDA build, which is right for cuda.txt; cpu.txt pins PyTorch's
own CPU build, whose wheels are listed in torch-cpu.txt. What stands in the old locks is kept where it still fits;
remove one to solve it afresh.
"""

import os
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOCKS = ROOT / "locks"
# What torch needs in every build. The CUDA build needs more; the solver reads that from PyPI.
TORCH_NEEDS = (
    "filelock",
    "typing-extensions>=4.10.0",
    "setuptools>=77.0.3",
    "sympy>=1.13.3",
    "networkx>=2.5.1",
    "jinja2",
    "fsspec>=0.8.5",
)
# uv's marker for all of [tool.uv] environments.
EVERYWHERE = (
    "python_full_version < '3.14' and ((platform_machine == 'aarch64' and sys_platform == 'linux')"
    " or (platform_machine == 'x86_64' and sys_platform == 'linux'))"
)


def torch_cpu_wheels() -> dict[str, str]:
    """File name -> SHA-256 of each wheel in torch-cpu.txt."""
    lines = (LOCKS / "torch-cpu.txt").read_text(encoding="utf-8").splitlines()
    return {name: digest for digest, name in (line.split() for line in lines if not line.startswith("#"))}


def solve(extra: str, *flags: str) -> None:
    """Write locks/<extra>.txt."""
    # uv keeps the hashes in the old file for a version that stays. An older cuda.txt may hold those of a CPU build.
    local_wheels = ("PIP_FIND_LINKS", "UV_FIND_LINKS", "UV_TORCH_BACKEND")
    environment = {name: value for name, value in os.environ.items() if name not in local_wheels}
    command = [Path(sys.executable).with_name("uv"), "pip", "compile", "pyproject.toml"]
    command += ["--extra", extra, "--extra", "dev", "--extra", "fleet", "--universal", "--python-version", "3.11"]
    command += ["--generate-hashes", "--no-annotate", "--no-header", "--quiet"]
    command += ["--output-file", f"locks/{extra}.txt", *flags]
    subprocess.run(command, cwd=ROOT, env=environment, check=True)
    # Said of nearly every package: that the environments of pyproject.toml are meant. What is narrower stays.
    lock = LOCKS / f"{extra}.txt"
    lock.write_text(lock.read_text(encoding="utf-8").replace(f" ; {EVERYWHERE} \\", " \\"), encoding="utf-8")


def write_metadata_wheel(folder: Path, name: str) -> None:
    """A wheel of that name with torch's metadata and nothing else: the solver asks for no more."""
    version = name.split("-")[1]
    info = f"torch-{version}.dist-info"
    metadata = [f"Name: torch\nVersion: {version}", *(f"Requires-Dist: {need}" for need in TORCH_NEEDS)]
    tags = name.removesuffix(".whl").split("-", 2)[2]
    with zipfile.ZipFile(folder / name, "w") as wheel:
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\n" + "\n".join(metadata) + "\n")
        wheel.writestr(f"{info}/WHEEL", f"Wheel-Version: 1.0\nRoot-Is-Purelib: false\nTag: {tags}\n")
        wheel.writestr(f"{info}/RECORD", "")


def solve_cpu() -> None:
    """Solve with metadata wheels in place of torch's, then write the real wheels' hashes."""
    wheels = torch_cpu_wheels()
    with tempfile.TemporaryDirectory() as folder:
        for name in wheels:
            write_metadata_wheel(Path(folder), name)
        solve("cpu", "--find-links", folder)
    lock = LOCKS / "cpu.txt"
    hashes = " \\\n".join(f"    --hash=sha256:{digest}" for digest in sorted(wheels.values()))
    block = re.compile(r"^(torch==\S+\+cpu\b.*?) \\\n(?:    --hash=\S+(?: \\)?\n)+", flags=re.M)
    text, n_blocks = block.subn(lambda found: f"{found[1]} \\\n{hashes}\n", lock.read_text(encoding="utf-8"))
    if n_blocks != 1:
        sys.exit(f"error: {lock}: {n_blocks} blocks of torch's CPU build, expected one")
    lock.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    solve_cpu()
    solve("cuda")
