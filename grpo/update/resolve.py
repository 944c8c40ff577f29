"""What the engine, the policy and the learner need to know before any of them is made.

    config, start = resolve_training(config, model_path, tokenizer)    # complete: with the ranks of the adapter to start from
    settings = engine_settings(config, model_path)                     # of vLLM
"""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedTokenizerBase

from ...rollout.engine import EngineSettings
from ...rollout.model_limits import check_model_dtype, check_model_limits
from ...rollout.routed_experts import UseOfExperts, use_of_experts
from ..common.weight_files import find_weights
from ..config import GRPOConfig
from ..data.run_inputs import with_fitting_prompts
from ..model.base_model import nf4_names
from ..model.start import StartAdapter, resolve_start
from ..model.targets import target_module_names
from .device import device_of_torch
from .objective import Objective


def resolve_training(
    config: GRPOConfig, model_path: str, tokenizer: PreTrainedTokenizerBase
) -> tuple[GRPOConfig, StartAdapter | None]:
    """`resolve_start`, and checks that a user-supplied objective can be loaded, and that the model can sample as asked.

    Raises:
        ValueError, FileNotFoundError: the objective cannot be loaded, or the model has not the context or the tokens that
            `rollout` needs, or no experts to replay, or does not work in `model.dtype`, or training cannot start from this
            adapter, or it is in the folder that the run replaces.
    """
    Objective(config)
    config = with_fitting_prompts(config, model_path)
    check_model_limits(config.rollout, model_path, tokenizer)
    vllm_on_cpu = config.rollout.engine == "vllm" and device_of_torch() == "cpu"
    check_model_dtype(model_path, config.model.dtype, vllm_on_cpu=vllm_on_cpu)
    experts_of(config, model_path)
    config, start = resolve_start(config, model_path)
    output_dir = config.logging.output_dir
    if start is not None and start.folder.resolve().is_relative_to(output_dir.resolve()):
        raise ValueError(
            f"lora.start_from: {start.folder} is inside {output_dir}, which a new run replaces: set another logging.output_dir"
        )
    return config, start


def experts_of(config: GRPOConfig, model_path: str) -> UseOfExperts:
    """What a run does with the sampler's choice of experts.

    Raises:
        ValueError: `rollout.routed_experts` asks for what nothing returns.
    """
    return use_of_experts(config.rollout, model_path, on_cpu=device_of_torch() == "cpu")


def engine_settings(config: GRPOConfig, model_path: str) -> EngineSettings:
    """The settings of vLLM from the configuration.

    Raises:
        ValueError: `lora.targets` is a preset or an expression that fits no layer of the model, or one that cannot be adapted.
    """
    files = find_weights(Path(model_path))
    # On CUDA `auto` are vLLM's kernels, which split a sum and add its parts by atomics.
    dense = {"lora_path": "dense"} if config.deterministic and device_of_torch() == "cuda" else {}
    return EngineSettings(
        model=model_path,
        tokenizer=config.model.tokenizer,
        rollout=config.rollout.model_copy(update=dense),
        target_modules=target_module_names(model_path, config.lora.targets),
        max_rank=config.lora.max_rank,
        dtype=config.model.dtype,
        seed=config.seed,
        max_num_seqs=config.max_num_seqs,
        keep_base_weights=config.model.share_base_weights is True,
        nf4_weights=nf4_names(model_path) if config.model.load_in == "nf4" else (),
        weight_files=files.names if files.others else (),
        returns_experts=experts_of(config, model_path) != "ignore",
    )
