#!/usr/bin/env bash
# run.sh [options] COMMAND...: runs a command of .venv-cuda on a CUDA device that is not there.
#   --gpu NAME        h100 (default) h200 a100 a10 3090 4090 l4 5090 b200 t4
#   --memory GIB      of a device (default 6: untouched memory costs nothing, but vLLM touches some of its cache)
#   --devices N       how many (default 1)
#   --venv FOLDER     the environment (default: .venv-cuda of the repository)
#   --log FILE        writes FILE.<pid>: kernels by name and how often they were launched, functions that only succeeded
#   --compute nothing     no kernel computes anything: launches, memory, copies and captures are checked only
#   --compute no-triton   torch's operators compute, Triton's kernels do not (else its interpreter computes them: slowly)
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
venv=$here/../../.venv-cuda compute=all
while [[ ${1:-} == --* ]]; do
    case $1 in
        --gpu) export NULLCUDA_GPU=$2 ;;
        --memory) export NULLCUDA_MEM_GB=$2 ;;
        --devices) export NULLCUDA_DEVICES=$2 ;;
        --log) export NULLCUDA_LOG=$2 ;;
        --venv) venv=$2 ;;
        --compute) compute=$2 ;;
        *) sed -n '2,/^set /s/^# \{0,1\}//p' "$0" && exit 2 ;;
    esac
    shift 2
done
venv=$(cd "$venv" && pwd)
"$here/build.sh" "$venv" >&2
built=$venv/nullcuda
if [[ $compute != nothing ]]; then
    export PYTHONPATH=$here/host:$built${PYTHONPATH:+:$PYTHONPATH} NULLCUDA_COMPUTE=$compute
fi
export NULLCUDA_MEM_GB=${NULLCUDA_MEM_GB:-6}
export LD_PRELOAD=$built/libcuda.so.1 LD_LIBRARY_PATH=$built${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH} TRITON_LIBCUDA_PATH=$built
export TORCH_CUDNN_SDPA_DEPRIORITIZED=${TORCH_CUDNN_SDPA_DEPRIORITIZED-1} # cuDNN makes its plans on the device
export PATH=$venv/bin:$PATH
exec "$@"
