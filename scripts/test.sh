#!/usr/bin/env bash
# Installs what is missing, then runs the tests; arguments go to pytest.
#
#   scripts/test.sh                      everything
#   scripts/test.sh -m "not engine"      the quick ones: no vLLM engine is started
#   scripts/test.sh tests/grpo -k config
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

scripts/install.sh
# The command and not `python -m pytest`: that would put the root on sys.path, where `kernels` shadows another package.
exec .venv/bin/pytest "$@"
