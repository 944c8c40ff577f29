#!/usr/bin/env bash
# Installs missing packages, then runs the tests; arguments go to pytest.
#
#   scripts/test.sh                      all tests
#   scripts/test.sh -m "not engine"      the fast ones, without a vLLM engine
#   scripts/test.sh tests/grpo -k config
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

scripts/install.sh
# Not `python -m pytest`, which would put the root on sys.path, where `kernels` shadows another package.
exec .venv/bin/pytest "$@"
