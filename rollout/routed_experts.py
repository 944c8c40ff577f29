"""Which experts vLLM chose for each token of a mixture of experts, and when it can tell.

    use = use_of_experts(config.rollout, "path/to/model", on_cpu=True)     # "ignore", "compare" or "replay"
    recorder = record_experts(llm_engine)                                  # vllm_compat: on CPU, once the engine is built
    choices = completion.routed_experts                                    # [prompt + tokens - 1, layers, top_k]

vLLM 0.32 records the choices of its routers (`enable_return_routed_experts`) and keeps them beside the prefix cache, so that
tokens whose keys and values are cached have theirs too. Only its model runner V2 does so, which needs Triton's kernels. On CPU
`V1Recorder` gives each step of V1 to the same parts of vLLM.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from transformers import AutoConfig

from .config import RolloutConfig
from .model_limits import has_recurrent_layers

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput

UseOfExperts = Literal["ignore", "compare", "replay"]

EXPERT_KEYS = ("num_experts", "moe_num_experts", "n_routed_experts", "num_local_experts")
"""Names under which configurations have the number of experts, as vLLM reads them."""

COMPARED = frozenset({"qwen3_moe", "qwen2_moe", "mixtral", "olmoe", "glm4_moe", "gpt_oss"})
"""Kinds of models whose routers `auto` compares. Others are tried if the option says so."""


def has_experts(model_path: str) -> bool:
    """Whether the model is a mixture of experts."""
    config = AutoConfig.from_pretrained(model_path).get_text_config()
    numbers = [getattr(config, key, None) for key in EXPERT_KEYS]
    return any(isinstance(number, int) and number > 1 for number in numbers)


def use_of_experts(rollout: RolloutConfig, model_path: str, *, on_cpu: bool) -> UseOfExperts:
    """What `rollout.routed_experts` means for this model, engine and device.

    Raises:
        ValueError: it asks for choices of experts that nothing returns.
    """
    wanted = rollout.routed_experts
    if wanted == "ignore":
        return "ignore"
    if wanted == "auto":
        # On CUDA the option decides: some of vLLM's kernels for experts cannot tell, and an engine with them does not start.
        returned = rollout.engine == "vllm" and on_cpu and has_experts(model_path)
        kind = AutoConfig.from_pretrained(model_path).get_text_config().model_type if returned else ""
        return "compare" if kind in COMPARED else "ignore"
    option = f"rollout.routed_experts={wanted}"
    if rollout.engine == "torch":
        raise ValueError(
            f"{option}: the torch engine does not tell which experts it chose; it samples with the trainer's own forward pass: "
            "leave the option out, or set rollout.engine=vllm"
        )
    if not has_experts(model_path):
        raise ValueError(f"{option}: the model has no experts: leave it out")
    if on_cpu and has_recurrent_layers(model_path):
        raise ValueError(
            f"{option}: vLLM keeps its choice of experts beside the prefix cache, which it has not on CPU for models with "
            "recurrent layers: leave it out"
        )
    if not on_cpu and rollout.model_runner == "v1":
        raise ValueError(f"{option}: on CUDA vLLM tells which experts it chose with rollout.model_runner=v2 only: set it")
    return wanted


class V1Recorder:
    """Gives every step of the model runner V1 to vLLM's connector, which attaches the experts to the outputs.

    V2 makes the same calls by itself: `begin_step` with what the scheduler has planned, `prepare_output` behind the forward
    pass, and `process_output` once tokens are sampled. The routers of the model write into the connector's buffer.
    """

    def __init__(self, runner: Any, connector: Any) -> None:
        self._runner = runner
        self._connector = connector
        self._pending: Any | None = None
        self._execute_model, self._sample_tokens = runner.execute_model, runner.sample_tokens
        runner.execute_model, runner.sample_tokens = self.execute_model, self.sample_tokens

    def execute_model(self, scheduler_output: SchedulerOutput, intermediate_tensors: Any = None) -> Any:
        """The runner's, with a snapshot of the choices of this step."""
        self._connector.begin_step(scheduler_output.aux_output_connector_metadata)
        result = self._execute_model(scheduler_output, intermediate_tensors)
        if scheduler_output.total_num_scheduled_tokens:
            batch = self._runner.input_batch
            ids = list(batch.req_ids)
            tokens = [scheduler_output.num_scheduled_tokens[name] for name in ids]
            step = SimpleNamespace(
                req_ids=ids,
                query_start_loc_np=np.cumsum([0, *tokens]),
                num_computed_tokens_np=batch.num_computed_tokens_cpu[: len(ids)].copy(),
            )
            self._pending = self._connector.prepare_output(step)
        return result

    def sample_tokens(self, grammar_output: Any) -> Any:
        """The runner's, with the choices of each request."""
        output = self._sample_tokens(grammar_output)
        pending, self._pending = self._pending, None
        if pending is not None:
            sampled = np.array([len(tokens) for tokens in output.sampled_token_ids])
            pending.enqueue_cpu_copy(sampled, np.zeros_like(sampled))  # no token is rejected: nothing speculates
            output.aux_output_connector_output = pending.process_output()
        return output

    def close(self) -> None:
        """End the connector's thread."""
        self._connector.close()
