#!/usr/bin/env bash
# Installs missing packages, then teaches a small language model to add, on this machine; arguments are overrides.
#
#   scripts/quickstart.sh
#   scripts/quickstart.sh seed=1 logging.run_name=quickstart-seed1
#   scripts/quickstart.sh optim.max_steps=10
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if [[ "${1:-}" == -h || "${1:-}" == --help ]]; then
    sed -n '2,7s/^# \{0,1\}//p' "$0"
    exit 0
fi
scripts/install.sh
exec .venv/bin/rankup train configs/quickstart.yaml "$@"
