#!/usr/bin/env bash
# Installs missing packages, then runs the tests in as many processes as there are cores; a selection of files in one process.
# Other arguments are passed to pytest.
#
#   scripts/test.sh                                   all but those marked exhaustive
#   scripts/test.sh --exhaustive tests/kernels        these too, of a folder or file
#   scripts/test.sh --quick                           skips tests marked engine, ray, runs or slow
#   scripts/test.sh --all                             everything that needs no CUDA build
#   scripts/test.sh --cuda                            on CUDA devices that are not there (tests/nullcuda/README.md), in .venv-cuda
#   scripts/test.sh tests/grpo -k config              one process
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if [[ "${1:-}" == -h || "${1:-}" == --help ]]; then
    sed -n '2,10s/^# \{0,1\}//p' "$0"
    exit 0
fi
if [[ "${1:-}" == --cuda ]]; then
    shift
    scripts/install.sh cuda --venv .venv-cuda
    OMP_NUM_THREADS=1 exec tests/nullcuda/test.sh "$@"
fi
scripts/install.sh
lane=()
case "${1:-}" in
    --quick) lane=(-m "not engine and not ray and not runs and not slow") && shift ;;
    --all) lane=(--exhaustive tests) && shift ;;
esac
# Not nproc, which OMP_NUM_THREADS changes. The tests of a file run in one process: they share engines, and Ray. In their order, files that take minutes come early.
processes=(-n "$(getconf _NPROCESSORS_ONLN)" --dist loadfile --no-loadscope-reorder)
previous=""
for argument in "$@"; do
    if [[ "$previous" != --exhaustive && -e "${argument%%::*}" ]]; then
        processes=()
    fi
    previous=$argument
done
# Not `python -m pytest`, which would put the root on sys.path, where `kernels` shadows another package.
exec .venv/bin/pytest "${processes[@]}" "${lane[@]}" "$@"
