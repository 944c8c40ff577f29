#!/usr/bin/env bash
# test.sh [arguments of pytest]: the tests of this folder and those marked `gpu`, on null devices, in as many processes as there
# are cores; a selection of files in one process. `scripts/test.sh --cuda` makes the environment first.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
for argument in "$@"; do
    if [[ -e "${argument%%::*}" ]]; then
        exec tests/nullcuda/run.sh pytest "$@"
    fi
done
mapfile -t of_gpus < <(grep -rl --include='test_*.py' 'pytest\.mark\.gpu' tests)
selection=(-m "(nullcuda or gpu) and not large" tests/nullcuda "${of_gpus[@]}")
exec tests/nullcuda/run.sh pytest -n "$(getconf _NPROCESSORS_ONLN)" --dist loadfile --no-loadscope-reorder "${selection[@]}" "$@"
