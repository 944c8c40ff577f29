#!/usr/bin/env bash
# Checks everything that runs on a GPU and writes one report folder. See --help.
set -euo pipefail

usage() {
    cat <<'HELP'
Usage: scripts/gpu_check.sh [--output FOLDER] [--model NAME] [--steps N] [--cpu]
       scripts/gpu_check.sh --no-engine [--output FOLDER] [--tiny] [--limit SECONDS] [--wheels FOLDER] [--cpu]

Runs on the GPU, one after the other: `rankup doctor`, the tests marked `gpu`, `rankup check`, a short GRPO run and `rankup eval`
of it, and the benchmarks of the kernels, of rollouts, of the training phase, of its ranks, and of a complete step against TRL's.
After a step that fails, the next ones still run. report.md in the folder is the summary; logs and results are next to it.

With --no-engine, the trainer alone, for a machine without vLLM and without network, in under five minutes: the self-test of the
kernels, each kernel beside torch and cuBLAS, and the learner on random weights of the shapes of Qwen2.5-1.5B and Qwen3-8B (in
bf16; the second one in NF4 too if bitsandbytes is installed): tokens per second, peak memory beside the plan's figure, and
whether two equal updates are bit-identical. Nothing is installed: any python3 with torch for CUDA (2.11 or later) and Triton
runs the kernels; the learner needs transformers 5, peft, accelerate and pydantic too.

  --output FOLDER   the report folder, new or empty (default: gpu_check/<date>-<device>)
  --model NAME      the model to check and to train: embedded, a local folder or a Hub id (default: smollm2-135m-instruct)
  --steps N         steps of the run (default: 20; with --cpu 2)
  --no-engine       the trainer alone, see above; --model and --steps have no effect
  --tiny            with --no-engine: the smallest sizes, which take seconds and show only that everything runs
  --limit SECONDS   with --no-engine: what a step may take (default: 120); then the next one runs
  --wheels FOLDER   with --no-engine: packages that are missing, as wheels; they are unpacked to a temporary folder
  --cpu             the same on the CPU, with the smallest sizes: some tests of kernels instead of those for a GPU, and of the
                    benchmarks only kernels and training phase
  -h, --help        show this text

The exit status is 0 if every step succeeded, 1 if one failed, 2 without a GPU, 130 after Ctrl-C, which stops the running step
and writes the report; a second Ctrl-C kills it.

Examples:
  scripts/gpu_check.sh
  scripts/gpu_check.sh --model Qwen/Qwen2.5-0.5B-Instruct --steps 50
  scripts/gpu_check.sh --cpu --output /tmp/report
  pip download --no-deps -d wheels pydantic pydantic-core annotated-types typing-inspection   # where there is a network
  scripts/gpu_check.sh --no-engine --wheels wheels                                            # and on the bare machine
HELP
}

fail() {
    echo "gpu_check: $*" >&2
    exit 2
}

# --- Options -----------------------------------------------------------------------------------------------------

output="" model="smollm2-135m-instruct" steps="" cpu="" engine=yes wheels="" tiny="" limit=120
while (($#)); do
    case "$1" in
        --output | --model | --steps | --wheels | --limit)
            [[ -n "${2:-}" ]] || fail "$1 needs a value: see --help"
            printf -v "${1#--}" '%s' "$2"
            shift
            ;;
        --cpu) cpu=yes ;;
        --no-engine) engine="" ;;
        --tiny) tiny=--tiny ;;
        -h | --help)
            usage
            exit 0
            ;;
        *) fail "unknown option '$1': see scripts/gpu_check.sh --help" ;;
    esac
    shift
done
[[ -z "$steps" || "$steps" =~ ^[1-9][0-9]*$ ]] || fail "--steps must be an integer of at least 1, not '$steps'"
[[ -z "$output" ]] || output=$(realpath -m -- "$output")
[[ "$limit" =~ ^[1-9][0-9]*$ ]] || fail "--limit must be an integer of at least 1, not '$limit'"
[[ ! -d "$model" ]] || model=$(realpath -- "$model")
[[ -z "$wheels$tiny" || -z "$engine" ]] || fail "--wheels and --tiny need --no-engine"
[[ -z "$wheels" ]] || wheels=$(realpath -- "$wheels")

cd "$(dirname "${BASH_SOURCE[0]}")/.."

use_environment() { # the active environment, or the repository's
    local rankup bin
    rankup=$(command -v rankup) || rankup="$PWD/.venv/bin/rankup"
    [[ -x "$rankup" ]] || fail "rankup is not installed: run scripts/install.sh (--no-engine needs no installation)"
    bin=$(realpath -s -- "$(dirname -- "$rankup")")
    PATH="$bin:$PATH"
}

use_checkout() { # this checkout as the package rankup, for any python3 with torch: the active one, or the repository's
    python3 -P -c 'import torch' 2>/dev/null || PATH="$PWD/.venv/bin:$PATH"
    packages=$(mktemp -d -t rankup-check-XXXXXX)
    trap 'rm -rf -- "$packages"' EXIT
    if [[ -n "$wheels" ]]; then
        python3 -m pip install -q --no-index --no-deps --no-compile --target "$packages" "$wheels"/*.whl >&2 ||
            fail "the wheels in $wheels do not fit this python3"
    fi
    local version
    version=$(sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)
    ln -s "$PWD" "$packages/rankup"
    mkdir "$packages/rankup-$version.dist-info"
    printf 'Metadata-Version: 2.1\nName: rankup\nVersion: %s\n' "$version" >"$packages/rankup-$version.dist-info/METADATA"
    export PYTHONPATH="$packages${PYTHONPATH:+:$PYTHONPATH}"
}

# A benchmark that hangs must not keep the report back. With an engine nothing is in a hurry.
[[ -z "$engine" ]] || limit=1800
if [[ -n "$engine" ]]; then use_environment; else use_checkout; fi
[[ -z "$cpu" ]] || export CUDA_VISIBLE_DEVICES=""

[[ ! -e "$output" || -z "$(ls -A -- "$output")" ]] || fail "$output is not empty: choose another folder"
device=$(python3 -P -c 'import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else "")') ||
    fail "torch does not work in $(command -v python3): run scripts/install.sh"
if [[ -z "$cpu" && -z "$device" ]]; then
    fail "torch finds no GPU (see rankup doctor); scripts/gpu_check.sh --cpu runs the same steps on the CPU"
fi
slug=$(tr -cs '[:alnum:]\n' - <<<"${device:-cpu}" | tr '[:upper:]' '[:lower:]')
output=${output:-"$PWD/gpu_check/$(date +%Y%m%d-%H%M%S)-$slug"}
mkdir -p -- "$output/logs" "$output/bench"
steps=${steps:-$([[ -n "$cpu" ]] && echo 2 || echo 20)}

# --- Steps --------------------------------------------------------------------------------------------------------

child="" interrupted="" failed=""
on_signal() { # pass INT or TERM to the running step; a second signal kills it
    local signal=$1
    [[ -z "$interrupted" ]] || signal=KILL
    interrupted=yes
    [[ -z "$child" ]] || kill "-$signal" -- "-$child" 2>/dev/null || true
}
trap 'on_signal INT' INT
trap 'on_signal TERM' TERM

step() { # name, command...
    [[ -z "$interrupted" ]] || return 0
    local name=$1 started=$SECONDS status=0 word=ok
    shift
    printf '%-12s ' "$name"
    # In a separate process group: Ctrl-C reaches this script only, which passes it on once.
    set -m
    "$@" >"$output/logs/$name.log" 2>&1 </dev/null &
    child=$!
    set +m
    while kill -0 "$child" 2>/dev/null; do # a signal interrupts `wait`, not the step
        wait "$child" && status=0 || status=$?
    done
    child=""
    if [[ -n "$interrupted" ]]; then
        word=interrupted
    elif ((status)); then
        word="failed ($status)" failed=yes
    fi
    printf '%-12s %5d s\n' "$word" $((SECONDS - started))
    printf '%s\t%s\t%d\t%s\n' "$name" "$word" $((SECONDS - started)) "$*" >>"$output/steps.tsv"
}

doctor() {
    local status=0
    rankup doctor || status=$?
    rankup doctor --json >"$output/doctor.json" || status=$?
    return "$status"
}

bench() { # file of the results without .json, the benchmark, its options...
    local name=$1 script=$2
    shift 2
    step "$name" timeout --kill-after=10 "$limit" python3 "scripts/bench/$script.py" --json "$output/bench/$name.json" "$@"
}

finish() {
    trap '' INT TERM
    python3 -P scripts/gpu_report.py "$output"
    [[ -z "$interrupted" ]] || exit 130
    [[ -z "$failed" ]] || exit 1
    exit 0
}

# --- Without an engine --------------------------------------------------------------------------------------------

if [[ -z "$engine" ]]; then
    echo "gpu_check: ${device:-the CPU}, the trainer alone, report in $output"
    bench self_test self_test
    bench kernel_times kernel_times ${tiny:+"$tiny"}
    if [[ -n "$cpu$tiny" ]]; then
        bench learner-tiny learner --shape tiny --repeats 2
        bench learner-tiny-nf4 learner --shape tiny --repeats 2 --nf4
    else
        bench learner-1.5b learner --shape 1.5b
        bench learner-8b learner --shape 8b --repeats 3
        bench learner-8b-nf4 learner --shape 8b --repeats 3 --nf4
    fi
    finish
fi

# --- With an engine -----------------------------------------------------------------------------------------------

quickstart=(configs/quickstart.yaml "model=$model")
run=("${quickstart[@]}" "optim.max_steps=$steps" data.eval_rows=32 "logging.output_dir=$output/run" logging.run_name=gpu-check)
if [[ -n "$cpu" ]]; then
    tests=(tests/kernels/test_self_test.py tests/kernels/test_rms_norm.py -m "not gpu and not slow")
    # So few completions may all get the same reward; the entropy bonus still gives every step a gradient.
    run+=(optim.prompts_per_step=2 data.eval_rows=4 algorithm.entropy_coef=0.001)
    train_step=(--case 16+8 --repeats 1 --main-only) shape=learner-tiny
else
    tests=(tests -m gpu)
    train_step=() shape=learner-1.5b
fi

echo "gpu_check: ${device:-the CPU}, $model, report in $output"
step doctor doctor
step kernels pytest -rs -p no:cacheprovider "${tests[@]}"
step check rankup check "${quickstart[@]}"
step train rankup train "${run[@]}"
step eval rankup eval "$output/run"
bench kernel_times kernel_times
bench "$shape" learner --shape "${shape#learner-}"
step train_step scripts/bench/train_step.py --json "$output/bench/train_step.json" "${train_step[@]}"
if [[ -z "$cpu" ]]; then # minutes each, and a quarter of an hour on a CPU
    step rollout scripts/bench/rollout.py --json "$output/bench/rollout.json"
    step rank scripts/bench/rank.py --json "$output/bench/rank.json"
    step vs_trl scripts/bench/vs_trl.py --json "$output/bench/vs_trl.json"
fi
finish
