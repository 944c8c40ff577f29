"""vLLM, the policy on its adapter slots, and what trains it: what a run holds in memory while it goes on.

    with open_session(config, model_path, note=print) as session:
        session.engine.rollout(...)
        session.learner.update(...)
        session.publish()
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from ...kernels.cpu_memory import keep_freed_memory
from ...rollout.engine import RolloutEngine
from ..common.quiet import quiet_stderr
from ..common.world import SINGLE_PROCESS, World
from ..config import GRPOConfig
from ..experience.collect import engine_settings
from ..model.policy import Policy
from ..model.prove import prove_slots
from .learner import Learner
from .optimizer import check_device


@dataclass(frozen=True, slots=True)
class Session:
    """The parts of a running trainer that share one copy of the adapter."""

    engine: RolloutEngine
    policy: Policy
    learner: Learner

    def publish(self) -> int:
        """Make the policy as it is the one that the engine samples with; returns its version."""
        return self.engine.publish(self.policy.write_slots)


@contextmanager
def open_session(
    config: GRPOConfig,
    model_path: str,
    *,
    pad_token_id: int = 0,
    engine: RolloutEngine | None = None,
    note: Callable[[str], None],
    world: World = SINGLE_PROCESS,
) -> Iterator[Session]:
    """Start vLLM and the policy on one copy of the adapter, prove the map, and stop the engine in the end.

    Args:
        engine: one to sample with, which stays open. None: one of its own.
        note: told what the user should know about how this model is computed.

    Raises:
        ValueError: the optimizer does not run on this device; the engine was made with other settings than this run needs;
            the model cannot be adapted as asked.
        RuntimeError: vLLM does not sample from the policy that would be trained.
    """
    check_device(config.optim, "cuda" if torch.cuda.is_available() else "cpu")
    keep_freed_memory()
    settings = engine_settings(config, model_path)
    if engine is not None:
        differences = engine.settings.differences(settings)
        if differences:
            raise ValueError(f"the engine was made with other settings than this run needs: {'; '.join(differences)}")
    with quiet_stderr():
        own = engine or RolloutEngine(settings)
    try:
        with quiet_stderr():
            policy = make_policy(config, model_path, own)
        if policy.plain_reason is not None:
            note(f"each prompt is computed once per completion: {policy.plain_reason}")
        note(base_note(policy))
        note(policy.fusion.summary)
        prove_slots(policy, own)
        own.policy_version = 0  # a run counts its own policies: 0 is the adapter that it begins with
        yield Session(own, policy, Learner(policy, config, pad_token_id=pad_token_id, world=world))
    finally:
        if engine is None:
            own.close()


def make_policy(config: GRPOConfig, model_path: str, engine: RolloutEngine) -> Policy:
    """The policy that a configuration asks for, on the adapter slots of the engine and, where it says so, on its base weights.

    Raises:
        ValueError: the model cannot be adapted as asked, or not all of its base weights can be shared.
    """
    share = config.model.share_base_weights
    policy = Policy(
        model_path,
        lora=config.lora,
        dtype=config.model.dtype,
        seed=config.seed,
        device=engine.device,
        gradient_checkpointing=config.optim.gradient_checkpointing,
        logits_mib=config.optim.logits_mib,
        load_in=config.model.load_in,
        shared=engine.base_weights() if share else None,
    )
    if share is True and policy.base.own:
        raise ValueError(
            f"model.share_base_weights: vLLM does not hold {policy.base.own[0]} as the trainer needs it "
            f"({len(policy.base.own)} weights in all): set it to auto or false"
        )
    policy.attach(engine.slots)
    return policy


def base_note(policy: Policy) -> str:
    """Where the base weights lie, in a line."""
    base = policy.base
    shared, own = (f"{size / 2**20:,.0f} MiB" for size in (base.shared_bytes, base.own_bytes))
    if not base.shared_bytes:
        return f"base weights: {own} of the trainer's own, beside vLLM's"
    return f"base weights: {shared} held once for trainer and vLLM" + (f", {own} of the trainer's own" if base.own else "")
