"""vLLM, the policy on its adapter slots, and the learner: the objects of a run in memory.

    with open_session(config, model_path) as session:
        groups = list(session.engine.rollout(prompts, config.rollout))
        session.publish()
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from ...kernels.cpu_memory import keep_freed_memory
from ...rollout.engine import EngineSettings, RolloutEngine
from ..common.log import logger
from ..common.quiet import quiet_stderr
from ..common.world import SINGLE_PROCESS, World
from ..config import GRPOConfig
from ..model.adapters import target_module_names
from ..model.base_model import nf4_names
from ..model.policy import Policy
from ..model.prove import prove_slots
from .learner import Learner
from .optimizer import check_device


@dataclass(frozen=True, slots=True)
class Session:
    """The parts of a run that share one copy of the adapter."""

    engine: RolloutEngine
    policy: Policy
    learner: Learner

    def publish(self) -> int:
        """Make the current policy the one that the engine samples with; returns its version."""
        return self.engine.publish(self.policy.write_slots)


@contextmanager
def open_session(
    config: GRPOConfig,
    model_path: str,
    *,
    pad_token_id: int = 0,
    engine: RolloutEngine | None = None,
    world: World = SINGLE_PROCESS,
) -> Iterator[Session]:
    """Start vLLM and the policy on one copy of the adapter, prove the slot map, and stop the engine at the end.

    Args:
        engine: a user-supplied one, which stays open; None: one for this session.

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
        sampler = engine or RolloutEngine(settings)
    try:
        with quiet_stderr():
            policy = make_policy(config, model_path, sampler)
        if policy.plain_reason is not None:
            logger.info(f"each prompt is computed once per completion: {policy.plain_reason}")
        logger.info(base_note(policy))
        logger.info(policy.fusion.summary)
        prove_slots(policy, sampler)
        sampler.policy_version = 0  # a run counts its policies from the initial adapter
        yield Session(sampler, policy, Learner(policy, config, pad_token_id=pad_token_id, world=world))
    finally:
        if engine is None:
            sampler.close()


def engine_settings(config: GRPOConfig, model_path: str) -> EngineSettings:
    """The settings of vLLM from the configuration.

    Raises:
        ValueError: `lora.targets` is an expression that fits no layer of the model, or one that cannot be adapted.
    """
    return EngineSettings(
        model=model_path,
        rollout=config.rollout,
        target_modules=target_module_names(model_path, config.lora),
        max_rank=config.lora.max_rank,
        dtype=config.model.dtype,
        seed=config.seed,
        max_num_seqs=config.max_num_seqs,
        keep_base_weights=config.model.share_base_weights is True,
        nf4_weights=nf4_names(model_path) if config.model.load_in == "nf4" else (),
    )


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
    if share is True and policy.base.unshared:
        raise ValueError(
            f"model.share_base_weights: vLLM does not hold {policy.base.unshared[0]} as the trainer needs it "
            f"({len(policy.base.unshared)} weights in all): set it to auto or false"
        )
    policy.attach(engine.slots)
    return policy


def base_note(policy: Policy) -> str:
    """One line about where the base weights are in memory."""
    base = policy.base
    shared, unshared = (f"{size / 2**20:,.0f} MiB" for size in (base.shared_bytes, base.unshared_bytes))
    if not base.shared_bytes:
        return f"base weights: {unshared} held by the trainer, in addition to vLLM's copy"
    rest = f", {unshared} held by the trainer only" if base.unshared else ""
    return f"base weights: {shared} held once for trainer and vLLM{rest}"
