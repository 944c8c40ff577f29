#!/usr/bin/env bash
# build.sh [VENV]: builds the null device for an environment of `scripts/install.sh cuda` (default: .venv-cuda), in VENV/nullcuda:
# the driver (libcuda.so.1, libnvidia-ml.so.1) and the operators of torch on the host (on_host.so). Does nothing if nothing
# changed. Needs gcc and g++; takes about a minute of one core.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
venv=$(cd "${1:-$here/../../.venv-cuda}" && pwd)
python=$venv/bin/python
out=$venv/nullcuda

packages=("$venv"/lib/python3*/site-packages)
site=${packages[0]}
include=$site/nvidia/cu13/include
[[ -e $include/cuda.h ]] || { echo "nullcuda: $venv has no CUDA packages: run scripts/install.sh cuda --venv .venv-cuda" >&2; exit 1; }

stamp=$({ cat "$here"/build.sh "$here"/driver/* "$here"/host/*.cpp && ls "$site" | grep -E '^(torch|vllm|triton|bitsandbytes)-'; } | sha256sum)
[[ "$(cat "$out/stamp" 2>/dev/null)" != "$stamp" ]] || exit 0
echo "nullcuda: building $out"
mkdir -p "$out"
exec 9<"$out" # the folder itself is the lock
flock 9
[[ "$(cat "$out/stamp" 2>/dev/null)" != "$stamp" ]] || exit 0
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# --- The driver --------------------------------------------------------------------------------------------------

for source in "$here"/driver/*.c; do
    gcc -O1 -g -fPIC -Wall -Wextra -Wno-unused-parameter -fvisibility=hidden -I"$include" -c "$source" -o "$work/$(basename "$source").o"
done
nm --defined-only "$work"/*.o | awk '$2 == "T" {print $3}' | sort -u >"$work/defined"

called() { # functions of CUDA that torch, vLLM and bitsandbytes call, and all that the headers declare
    find "$site/torch/lib" "$site/vllm" -name '*.so' -print0 | xargs -0 nm -D --undefined-only 2>/dev/null | awk '{print $2}' | sed 's/@.*//'
    nm -D --undefined-only "$site"/bitsandbytes/libbitsandbytes_cuda13*.so | awk '/ U /{print $2}' | sed 's/@.*//'
    gcc -E -I"$include" -x c "$include/cuda.h" | grep -oE '\bcu[A-Z][A-Za-z0-9]*(_v[0-9])? *\(' | tr -d '( '
    gcc -E -I"$include" -x c "$include/cuda_runtime_api.h" | grep -oE '\bcuda[A-Z][A-Za-z0-9]*(_v[0-9])? *\(' | tr -d '( '
}
# What those libraries answer themselves, without a device: their versions, words for errors, descriptions of products.
own_answers='^cupti|^cuFile|Get(Error|Status|LastError)String$|^cu(blasLt|dnn|sparse|solver|fft|blas)GetVersion|^cudnnGet(CudartVersion|Property)'
own_answers+='|^ncclGet(Version|LastError|ErrorString)|^cublasLtMatmul(Desc|Pref)|^cublasLtMatrixLayout|^cufftGetVersion'
called | grep -E '^(cuda|cu[A-Z]|cublas|cudnn|cusparse|cufft|curand|cusolver|nccl)[A-Z_a-z0-9]*$' | grep -vE "$own_answers" |
    sort -u | comm -23 - "$work/defined" >"$work/others"
{
    echo 'int nullcuda_called(const char *);'
    awk '{print "int " $1 "(void) { return nullcuda_called(\"" $1 "\"); }"}' "$work/others"
} >"$work/others.c"
gcc -O1 -fPIC -w -c "$work/others.c" -o "$work/others.c.o"
gcc -shared -o "$work/libcuda.so.1" "$work"/*.o -Wl,-soname,libcuda.so.1 -ldl -lpthread
mv "$work/libcuda.so.1" "$out" # not written in place: processes may be using it
ln -sf libcuda.so.1 "$out/libnvidia-ml.so.1"
ln -sf libcuda.so.1 "$out/libcuda.so"

# --- Torch's operators on the host -------------------------------------------------------------------------------

torch=$site/torch
python_include=$("$python" -c 'import sysconfig; print(sysconfig.get_paths()["include"])')
g++ -std=c++20 -O1 -w -shared -fPIC -DTORCH_EXTENSION_NAME=on_host -D_GLIBCXX_USE_CXX11_ABI=1 -DTORCH_API_INCLUDE_EXTENSION_H \
    -I"$torch/include" -I"$torch/include/torch/csrc/api/include" -I"$include" -I"$python_include" "$here/host/on_host.cpp" -o "$work/on_host.so" \
    -L"$torch/lib" -ltorch_python -ltorch -ltorch_cpu -ltorch_cuda -lc10 -lc10_cuda -L"$out" -l:libcuda.so.1 -Wl,-rpath,"$torch/lib"
mv "$work/on_host.so" "$out"
echo "$stamp" >"$out/stamp"
echo "nullcuda: $(wc -l <"$work/defined") functions are defined, $(wc -l <"$work/others") only succeed (${SECONDS} s)"
