#!/usr/bin/env bash
# Installs missing packages, then runs the tests in as many processes as there are cores; other arguments go to pytest.
#
#   scripts/test.sh                      the default: everything but exhaustive variants of tests
#   scripts/test.sh --quick              without vLLM, Ray and complete runs
#   scripts/test.sh --all                everything
#   scripts/test.sh tests/grpo -k config
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

scripts/install.sh
lane=(-m "not exhaustive")
case "${1:-}" in
    --quick) lane=(-m "not engine and not ray and not runs and not slow and not interpreted and not exhaustive") && shift ;;
    --all) lane=() && shift ;;
esac
if (($# == 0)); then # tests of one group, such as those that start vLLM, run in one process
    set -- -n "$(nproc)" --dist loadgroup
fi
# Not `python -m pytest`, which would put the root on sys.path, where `kernels` shadows another package.
exec .venv/bin/pytest "${lane[@]}" "$@"
