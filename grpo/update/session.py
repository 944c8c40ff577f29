"""The engine, the policy on its adapter slots, and the learner: the objects of a run in memory.

    with open_session(config, model_path) as session:
        groups = list(session.engine.rollout(prompts, config.rollout))
        session.publish()
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Literal

from ...kernels.lora import choose_kernel
from ...rollout.engine import RolloutEngine
from ...rollout.protocol import Engine
from ...rollout.torch_engine import TorchEngine
from ..common.log import logger
from ..common.quiet import quiet_stderr
from ..common.world import SINGLE_PROCESS, World
from ..config import GRPOConfig
from ..model.policy import Policy
from ..model.prove import prove_slots
from ..model.start import StartAdapter, resolve_start
from .device import check_device, check_dtype_here, device_of_torch, prepared_device
from .learner import Learner
from .resolve import engine_settings, experts_of


@dataclass(frozen=True, slots=True)
class Session:
    """The parts of a run that share one copy of the adapter. `planned_bytes`: of the GPU, at the peak of training."""

    engine: Engine
    policy: Policy
    learner: Learner
    planned_bytes: int | None = None

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
    has_episodes: bool = False,
    planned_bytes: int | None = None,
) -> Iterator[Session]:
    """Start the engine and the policy on one copy of the adapter, prove the slot map, and stop the engine at the end.

    Args:
        engine: a user-supplied one, which stays open; None: one for this session.
        has_episodes: completions of the run may have several turns; then the proof covers one with given tokens.
        planned_bytes: see `Session`.

    Raises:
        ValueError: optimizer or `model.dtype` do not run on this device; vLLM is missing; the engine was made with other
            settings than this run needs; the model cannot be adapted as asked.
        RuntimeError: the engine does not sample from the policy that would be trained.
    """
    with prepared_device(config), engine_and_policy(config, model_path, engine=engine) as (sampler, policy):
        for note in policy.target_notes:
            logger.info(note)
        if policy.plain_reason is not None:
            logger.info(f"each prompt is computed once per completion: {policy.plain_reason}")
        logger.info(base_note(policy, config.rollout.engine))
        logger.info(policy.fusion.summary)
        kernel = "triton" if config.deterministic and config.optim.lora_kernel == "auto" else config.optim.lora_kernel
        if note := choose_kernel(kernel, policy.any_pass, like=next(policy.model.parameters())):
            logger.info(note)
        prove_slots(policy, sampler, episodes=has_episodes)
        sampler.policy_version = 0  # a run counts its policies from the initial adapter
        learner = Learner(policy, config, pad_token_id=pad_token_id, world=world)
        yield Session(sampler, policy, learner, planned_bytes)


@contextmanager
def engine_and_policy(
    config: GRPOConfig, model_path: str, *, engine: RolloutEngine | None = None
) -> Iterator[tuple[Engine, Policy]]:
    """The engine of `rollout.engine`, and the policy on its adapter slots. It is closed at the end, unless it is the user's.

    Raises:
        ValueError: see `open_session`.
    """
    check_device(config, device_of_torch())
    config, start = resolve_start(config, model_path)
    if config.rollout.engine == "torch":
        if engine is not None:
            raise ValueError("rollout.engine=torch samples with the policy of the run itself: leave out `engine`")
        with _torch_engine(config, model_path, start) as (of_policy, policy):
            yield of_policy, policy
        return
    with _vllm_engine(config, model_path, engine) as sampler:
        with quiet_stderr():
            policy = make_policy(config, model_path, sampler, start=start)
        yield sampler, policy


@contextmanager
def sampling_engine(config: GRPOConfig, model_path: str) -> Iterator[Engine]:
    """The engine of `rollout.engine` for sampling alone: vLLM without a policy, so that base weights are in memory once.

    Its slots hold what the caller publishes. Ranks and targets are those of the configuration, whose `lora.start_from` must be
    None.

    Raises:
        ValueError: `model.dtype` does not run on this device, vLLM is missing, or the model cannot be adapted as asked.
    """
    assert config.lora.start_from is None, "the caller publishes what the slots hold"
    check_dtype_here(config.model.dtype)
    rollout = config.rollout.model_copy(update={"routed_experts": "ignore"})  # nothing is trained on them
    config = config.model_copy(update={"rollout": rollout})
    if config.rollout.engine == "torch":
        with _torch_engine(config, model_path, None) as (engine, _):
            yield engine
        return
    with _vllm_engine(config, model_path, None) as engine:
        yield engine


@contextmanager
def _torch_engine(
    config: GRPOConfig, model_path: str, start: StartAdapter | None
) -> Iterator[tuple[TorchEngine, Policy]]:
    with quiet_stderr():
        policy = make_policy(config, model_path, start=start)
    engine = TorchEngine(
        policy,
        model_path,
        tokenizer=config.model.tokenizer,
        max_num_seqs=config.max_num_seqs,
        max_model_length=config.rollout.max_model_length,
    )
    with closing(engine):
        yield engine, policy


@contextmanager
def _vllm_engine(config: GRPOConfig, model_path: str, engine: RolloutEngine | None) -> Iterator[RolloutEngine]:
    """The user's engine, or a new one that is closed at the end.

    It is apart from the policy for memory's sake: modules of vLLM keep the ImportErrors of optional packages for ever, and with
    them the frames that imported vLLM first, up to this generator. A policy among its variables would stay in memory.
    """
    if engine is not None:
        if differences := engine.settings.differences(engine_settings(config, model_path)):
            raise ValueError(f"the engine was made with other settings than this run needs: {'; '.join(differences)}")
        yield engine
        return
    with closing(start_engine(config, model_path)) as started:
        yield started


def start_engine(config: GRPOConfig, model_path: str) -> RolloutEngine:
    """vLLM for runs of this configuration, such as those of several trainers: `GRPOTrainer.train(engine=...)`. It is closed by
    the caller.

    Raises:
        ValueError: vLLM is not installed; or see `engine_settings`.
    """
    settings = engine_settings(config, model_path)
    with quiet_stderr():
        return RolloutEngine(settings)


def make_policy(
    config: GRPOConfig, model_path: str, engine: RolloutEngine | None = None, *, start: StartAdapter | None = None
) -> Policy:
    """Build the policy on vLLM's adapter slots and, depending on `model.share_base_weights`, on its base weights. Without vLLM
    the policy allocates both. `config`, `start`: the results of `resolve_start`.

    Raises:
        ValueError: the model cannot be adapted as asked, or not all of its base weights can be shared.
    """
    assert (start is None) == (config.lora.start_from is None), "resolve_start comes first"
    share = config.model.share_base_weights if engine is not None else False
    policy = Policy(
        model_path,
        lora=config.lora,
        start=start,
        dtype=config.model.dtype,
        seed=config.seed,
        device=device_of_torch() if engine is None else engine.device,
        gradient_checkpointing=config.optim.gradient_checkpointing,
        logits_mib=config.optim.logits_mib,
        load_in=config.model.load_in,
        deterministic=config.deterministic,
        shared=engine.base_weights() if engine is not None and share else None,
        slots=None if engine is None else engine.slots,
        experts=experts_of(config, model_path),
    )
    if share is True and policy.base.unshared:
        raise ValueError(
            f"model.share_base_weights=true: vLLM does not keep {len(policy.base.unshared)} base weights in the layout that "
            f"the trainer needs (first: {policy.base.unshared[0]}): use auto or false"
        )
    if start is not None and config.algorithm.beta > 0 and config.algorithm.reference == "start":
        policy.keep_reference()
    return policy


def base_note(policy: Policy, engine: Literal["vllm", "torch"]) -> str:
    """One line about where the base weights are in memory."""
    base = policy.base
    shared, unshared = (f"{size / 2**20:,.0f} MiB" for size in (base.shared_bytes, base.unshared_bytes))
    if engine == "torch":
        return f"base weights: {unshared} held once for trainer and sampler"
    if not base.shared_bytes:
        return f"base weights: {unshared} held by the trainer, in addition to vLLM's copy"
    rest = f", {unshared} held by the trainer only" if base.unshared else ""
    return f"base weights: {shared} held once for trainer and vLLM{rest}"
