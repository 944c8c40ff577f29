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
dtype=$(.venv/bin/python -P -c 'from rankup.kernels.device import native_dtype; print(native_dtype())')
if [[ "$dtype" != bfloat16 ]]; then
    echo "quickstart: this CPU has no bf16 instructions and would emulate them: model.dtype=$dtype"
    set -- "model.dtype=$dtype" "$@"
fi
exec .venv/bin/rankup train configs/quickstart.yaml "$@"
