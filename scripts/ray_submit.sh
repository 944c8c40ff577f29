#!/usr/bin/env bash
# Submits `rankup train` to an existing Ray cluster, with the current folder. See --help.
set -euo pipefail

usage() {
    cat <<'HELP'
Usage: scripts/ray_submit.sh [--env NAME ...] [--dry-run] FILE [section.field=value ...] [--resume]
                             [-- OPTIONS OF ray job submit]

Submits `rankup train FILE ...` as a job to a Ray cluster and follows it. The exit status is that of `ray job submit`: 0
when the job succeeds or is stopped, 1 when it fails. Ctrl-C ends following, not the job; `ray job stop ID` ends the job.

  --env NAME     pass this environment variable, which must be set, to the job and its workers. May be repeated
  --dry-run      submit nothing; print the runtime environment (values hidden) and the command
  -h, --help     show this text

The address of the cluster's dashboard (http://HOST:8265) comes from `-- --address ...`, RAY_API_SERVER_ADDRESS or
RAY_ADDRESS; the default is http://localhost:8265. Its nodes need rankup with the same version of Ray, on the PATH of
`ray start` (or in the same place as here). The command runs on the head node; Ray places the workers.

If ~/.ray/auth_token exists and RAY_AUTH_MODE is not set, the token is used, as in `ray start`.

The current folder is uploaded, at most 500 MiB: FILE, its data and its reward functions must be in it, with relative names.
Excluded are .git, environments, caches, runs/, the run folder, weights (*.safetensors, *.pt, ...), and the patterns in
.rayignore. A .gitignore has no effect, since it often lists data.

The run folder (logging.output_dir) and a model in a local folder are relative to the current folder, not to the job's copy
of it. The nodes must share both; a run folder that they do not share needs checkpoint.storage.

The job gets HF_TOKEN, HF_ENDPOINT, HF_HUB_OFFLINE, WANDB_API_KEY, WANDB_BASE_URL, WANDB_ENTITY, WANDB_MODE and
TRACKIO_SPACE_ID if they are set, and the variables of --env. Ray's dashboard shows the environment of a job to everyone
who can open it.

`ray job stop` sends SIGTERM, at which a run finishes its step and saves, and SIGKILL after RAY_JOB_STOP_WAIT_TIME_S: 3 s,
unless the head node was started with more, for example RAY_JOB_STOP_WAIT_TIME_S=600 ray start --head.

Examples:
  scripts/ray_submit.sh configs/quickstart.yaml cluster.workers=2
  scripts/ray_submit.sh run.yaml cluster.workers=16 --resume -- --address http://head:8265 --no-wait
  scripts/ray_submit.sh --env AWS_ACCESS_KEY_ID --env AWS_SECRET_ACCESS_KEY run.yaml cluster.workers=8 \
      checkpoint.storage=s3://bucket/run
HELP
}

fail() {
    echo "ray_submit: $*" >&2
    exit 1
}

# --- Arguments ---------------------------------------------------------------------------------------------------

names="" dry_run="" arguments=()
while (($#)); do
    case "$1" in
        --env)
            [[ -n "${2:-}" ]] || fail "--env needs the name of a variable, for example --env OPENAI_API_KEY"
            names+="$2 "
            shift
            ;;
        --dry-run) dry_run=yes ;;
        -h | --help)
            usage
            exit 0
            ;;
        --)
            shift
            break
            ;;
        *) arguments+=("$1") ;;
    esac
    shift
done
ray_options=("$@")
((${#arguments[@]})) || fail "run file missing: scripts/ray_submit.sh FILE [section.field=value ...]"

# The active environment, otherwise that of the repository.
rankup=$(command -v rankup) || rankup="$(dirname "${BASH_SOURCE[0]}")/../.venv/bin/rankup"
[[ -x "$rankup" ]] || fail "rankup is not installed here: run scripts/install.sh"
bin=$(realpath -s -- "$(dirname -- "$rankup")")
PATH="$bin:$PATH"

# --- The job -----------------------------------------------------------------------------------------------------

runtime_env="" shown="" submit=() job=()
# Prints assignments: runtime_env in JSON, `shown` for --dry-run, the words after `ray job submit --runtime-env FILE`, and
# the words that identify the job to `ray job`.
compose() {
    python3 -P - "$bin" "$names" "${#arguments[@]}" "${arguments[@]}" "${ray_options[@]}" <<'PYTHON'
import json
import os
import re
import shlex
import sys
import time
from pathlib import Path

import yaml

from rankup.grpo.cli.main import parse
from rankup.grpo.config import load_config
from rankup.grpo.common.model_files import EMBEDDED

PASSED = "HF_TOKEN HF_ENDPOINT HF_HUB_OFFLINE WANDB_API_KEY WANDB_BASE_URL WANDB_ENTITY WANDB_MODE TRACKIO_SPACE_ID"
EXCLUDED = """.git .venv venv node_modules __pycache__ .*_cache *.egg-info /runs /wandb
    *.safetensors *.gguf *.pt *.pth *.ckpt pytorch_model*.bin"""


def fail(text):
    sys.exit(f"ray_submit: {text}")


def option(words, name):
    """The value of an option, the last one if it is repeated."""
    pairs = [*zip(words, words[1:]), *(word.split("=", 1) for word in words if "=" in word)]
    return next((value for key, value in reversed(pairs) if key == name), None)


def as_override(key, path):
    text = str(path)
    return f"{key}={text if yaml.safe_load(text) == text else json.dumps(text)}"


bin, names, count, *words = sys.argv[1:]
arguments, ray_options = words[: int(count)], words[int(count) :]
if any(word.partition("=")[0] in ("--runtime-env", "--runtime-env-json") for word in ray_options):
    fail("this script makes the runtime environment: add variables with --env NAME, exclude files with a .rayignore")
unset = [name for name in names.split() if name not in os.environ]
if unset:
    fail(f"--env: {', '.join(unset)} is not set")

options = parse(["train", *arguments])
folder = Path.cwd()
file = options.file.parent.resolve() / options.file.name
try:
    config = load_config(options.file, options.overrides)
except (FileNotFoundError, ValueError) as error:
    fail(error)
run = config.logging.output_dir.absolute()
if not file.is_relative_to(folder):
    fail(f"{options.file} is not in the current folder, which is uploaded: change to a folder above it")
if file.is_relative_to(folder / "runs") or file.is_relative_to(run):
    fail(f"{options.file} is in a folder of runs, which is not uploaded: copy it to another folder")

excludes = EXCLUDED.split()
if run.is_relative_to(folder) and run != folder and not run.is_relative_to(folder / "runs"):
    excludes += [f"/{run.relative_to(folder)}", f"/{run.relative_to(folder)}.*"]  # and older runs with a number
variables = {name: os.environ[name] for name in [*PASSED.split(), *names.split()] if name in os.environ}
# Last on PATH of the nodes, so that rankup is found if `ray start` ran outside of its environment.
runtime_env = {"working_dir": str(folder), "excludes": excludes, "env_vars": {"PATH": f"${{PATH}}:{bin}", **variables}}

overrides = list(options.overrides)
if not config.logging.output_dir.is_absolute():
    overrides.append(as_override("logging.output_dir", run))
model = Path(config.model.name).expanduser()
if config.model.name.lower() not in EMBEDDED and model.is_dir() and not model.is_absolute():
    overrides.append(as_override("model.name", model.absolute()))
flags = {"--resume": options.resume, "--allow-changes": options.allow_changes, "--traceback": options.traceback}
given = [flag for flag, is_given in flags.items() if is_given]
entrypoint = ["rankup", "train", str(file.relative_to(folder)), *overrides, *given]

id = option(ray_options, "--submission-id")
if id is None:
    id = f"rankup-{re.sub(r'[^A-Za-z0-9_.-]+', '-', config.logging.run_name)}-{time.strftime('%Y%m%d-%H%M%S')}"
    ray_options += ["--submission-id", id]
address = option(ray_options, "--address")

submit = [*ray_options, "--", *entrypoint]
hidden = runtime_env | {"env_vars": runtime_env["env_vars"] | dict.fromkeys(variables, "(hidden)")}
command = f"RAY_RUNTIME_ENV_IGNORE_GITIGNORE=1 ray job submit --runtime-env FILE {shlex.join(submit)}"
print(f"runtime_env={shlex.quote(json.dumps(runtime_env))}")
print(f"shown={shlex.quote(yaml.safe_dump(hidden, sort_keys=False, width=999) + command)}")
print(f"submit=({shlex.join(submit)})")
print(f"job=({shlex.join([id, *(['--address', address] if address else [])])})")
PYTHON
}

composed=$(compose) || exit 1
eval "$composed" # names and quoted values only

if [[ -n "$dry_run" ]]; then
    echo "$shown"
    exit 0
fi

# --- Submit and follow -------------------------------------------------------------------------------------------

# `ray start` requires a token if one exists; `ray job` would send none.
[[ ! -f ~/.ray/auth_token ]] || export RAY_AUTH_MODE="${RAY_AUTH_MODE:-token}"
interrupted="" status=0
trap 'interrupted=yes' INT
# Through a pipe, since all users of this machine can read command lines.
RAY_RUNTIME_ENV_IGNORE_GITIGNORE=1 ray job submit --runtime-env <(printf '%s' "$runtime_env") "${submit[@]}" || status=$?
if [[ -n "$interrupted" ]]; then
    echo "ray_submit: no longer following. The job, if it was submitted, keeps running:"
    echo "  ray job logs --follow ${job[*]}"
    echo "  ray job stop ${job[*]}"
    exit 130
fi
exit "$status"
