"""The section `rollout` of a run's configuration: how completions are sampled. Imports no torch."""

from collections.abc import Mapping
from typing import Literal

from pydantic import Field, field_validator

from ..section import Section
from .generation_kwargs import GenerationKwargs, Text
from .limits import EngineName, check_engine_limits

MAX_COMPLETIONS = 16384
"""Most completions of a prompt: vLLM's limit."""


class SamplingConfig(Section):
    """How the completions of a prompt are sampled. Names and meanings are those of vLLM and TRL; `temperature` 0 is greedy.

    The engine does not read `max_prompt_length`: longer prompts are dropped when the data is prepared.
    """

    num_generations: int = Field(default=8, ge=1, le=MAX_COMPLETIONS)
    """Completions for each prompt (the group size G)."""

    max_prompt_length: int = Field(default=512, ge=1)
    """Longest prompt, in tokens, chat template included. Longer prompts are dropped and counted. The default is less if the
    model's context has no room for it."""

    max_completion_length: int = Field(default=256, ge=1)
    """Longest completion, in tokens; of an episode, all of its turns and what is given between them."""

    temperature: float = Field(default=1.0, ge=0)
    """Sampling temperature. 0: the likeliest token each time. Others: as in `RolloutConfig`."""

    top_p: float = Field(default=1.0, gt=0, le=1)
    """Probability mass to sample from, (0, 1]. Below 1 the policy that samples is not the one that is trained."""

    top_k: int = Field(default=-1, ge=-1)
    """Most likely tokens to sample from, at least 1. -1 (or TRL's 0): all of them."""

    min_p: float = Field(default=0.0, ge=0, le=1)
    """Least probability of a token as a share of the likeliest one's, [0, 1]."""

    repetition_penalty: float = Field(default=1.0, gt=0)
    """Above 1, tokens that occur in the prompt or the completion so far become less likely, above 0. Another value than 1
    samples from another policy than the one that is trained; `rollout.engine=vllm` only."""

    stop: list[Text] = Field(default=[])
    """Strings that end a completion. A single string will do. A string that is a special token, such as `<|im_end|>`, ends it
    too, although the text has no special tokens."""

    include_stop_str_in_output: bool = False
    """Keep the stop string in the text that reward functions see. False: the text ends before it. The tokens that are trained
    on are the same."""

    skip_special_tokens: bool = True
    """Leave special tokens out of the text that reward functions see. False: keep them, for tags such as `<think>` that the
    tokenizer has as special tokens. The token that ended a completion stays out unless `include_stop_str_in_output` is true."""

    generation_kwargs: GenerationKwargs = GenerationKwargs()
    """Further arguments of vLLM's SamplingParams: penalties, `min_tokens`, `bad_words`, structured output and others. Most of
    them sample from another policy than the one that is trained, and need `rollout.engine=vllm`."""

    @field_validator("stop", mode="before")
    @classmethod
    def _one_string_will_do(cls, stop: object) -> object:
        return [stop] if isinstance(stop, str) else stop

    @field_validator("top_k")
    @classmethod
    def _zero_is_off(cls, top_k: int) -> int:
        return top_k or -1

    @property
    def max_model_length(self) -> int:
        """Tokens of the longest sequence: prompt and completion."""
        return self.max_prompt_length + self.max_completion_length


class RolloutConfig(SamplingConfig):
    """Sampling in the trainer's process: sampling options of training, and settings of the engine."""

    num_generations: int = Field(default=8, ge=2, le=MAX_COMPLETIONS)
    """Completions for each prompt (the group size G), at least 2."""

    temperature: float = Field(default=1.0, gt=0)
    """Sampling temperature in training: 0.01 to 2, or with `rollout.engine=torch` 0.001 and above. Evaluations
    have `data.eval_temperature`."""

    engine: EngineName = "vllm"
    """What samples: `vllm`, or `torch`: the trainer's own forward with a KV cache. It is slower, needs no vLLM, and runs models
    whose layers mix tokens by attention only (no Mamba or RWKV). The options below, except `max_num_seqs`, are vLLM's."""

    max_num_seqs: int | None = Field(default=None, ge=1)
    """Sequences that are sampled concurrently. None: all completions of a step, at most 256."""

    gpu_memory_utilization: float | None = Field(default=None, gt=0, le=1)
    """Share of the GPU's memory for vLLM, (0, 1]: weights, buffers, graphs and KV cache. None: decided from the model, the
    lengths, the sequences that are sampled at the same time, the card, and what the trainer needs. CUDA only."""

    kv_cache_gib: float = Field(default=1.0, gt=0)
    """Size of vLLM's KV cache in GiB. CPU only."""

    release_kv_cache: bool | None = None
    """Give the memory of vLLM's KV cache back while gradients are computed, so that training can use it. None: yes. The
    prefix cache is emptied by every update anyway."""

    enforce_eager: bool | None = None
    """Run vLLM without graphs and compilation. None: decided by the device."""

    model_runner: Literal["v1", "v2"] = "v1"
    """vLLM's model runner: `v1`, which vLLM deprecates, or `v2` (CUDA only). They draw other tokens for the same seed."""

    routed_experts: Literal["auto", "ignore", "compare", "replay"] = "auto"
    """What is done with the experts that vLLM chose for each token, of mixtures of experts: `compare` measures how often the
    trainer chooses others (`sampling/router_flips`); `replay` lets the trainer compute with vLLM's choice, weighted by its own
    routers (arXiv 2510.11370); `ignore` neither. `auto`: compare on CPU. On CUDA vLLM tells its choice with `model_runner: v2`
    only."""

    tools: list[str] = Field(default=[])
    """Functions that the model may call, as `file.py:name` or `package.module:name`: functions with type hints and a docstring
    in Google's style. A single name will do. See docs/episodes.md."""

    environment: str | dict[str, str] | None = None
    """The class of the world that each completion acts in, as `file.py:Class` or `package.module:Class`,
    `openenv:http://host:port`, `textarena:Game-v0` or `gymnasium:Name-v0`; or several by name, of which a row's column
    `environment` names one. See docs/episodes.md."""

    max_tool_calling_iterations: int | None = Field(default=None, ge=1)
    """Most turns of an episode whose tool calls, or the environment's answer, are followed by another turn. None: no limit."""

    max_turn_length: int | None = Field(default=None, ge=1)
    """Longest turn of an episode, in tokens. None: what is left of `max_completion_length`, which is for all of its turns and
    of what is given between them."""

    tool_timeout: float = Field(default=60.0, gt=0)
    """Seconds for a call of a tool or an environment: of an async one, or of any if `tool_workers` is set."""

    tool_workers: int = Field(default=0, ge=0)
    """Threads for tools and environments that are not async, so that other episodes are sampled while they run. 0: they run
    between two steps of the engine, one after another, and a seeded run is repeated bit-exactly on
    the CPU."""

    tool_parser: str | None = None
    """How tool calls are read: `response_template` (of the tokenizer), `hermes`, `llama`, `qwen_xml`, or a parser of vLLM by
    its name. None: the first of these that reads what the model's chat template writes."""

    on_malformed_call: Literal["answer", "end"] = "answer"
    """What follows a tool call that cannot be parsed: the model sees why (`answer`), or the episode ends (`end`)."""

    lora_path: Literal["auto", "dense", "punica"] = "auto"
    """How vLLM computes the adapter: `dense` (plain products, one adapter), `punica` (vLLM's kernels), `auto`
    (dense on CPU and in float32, otherwise punica)."""

    @field_validator("tools", mode="before")
    @classmethod
    def _one_tool_will_do(cls, tools: object) -> object:
        return [tools] if isinstance(tools, str) else tools

    def greedy(self) -> SamplingConfig:
        """How evaluation samples by default: one completion of each prompt, the likeliest token each time.

        What changes the likelihoods themselves, such as a penalty or a grammar, applies as in training.
        """
        return self._changed({"num_generations": 1, "temperature": 0.0, "top_p": 1.0, "top_k": -1, "min_p": 0.0})

    def as_in_training(
        self,
        num_generations: int,
        *,
        temperature: float | None = None,
        top_p: float | None = None,
        max_completion_length: int | None = None,
    ) -> SamplingConfig:
        """How that many completions of a prompt are sampled as in training, apart from options that are not None."""
        changes = {"temperature": temperature, "top_p": top_p, "max_completion_length": max_completion_length}
        return self._changed({"num_generations": num_generations, **{k: v for k, v in changes.items() if v is not None}})

    def check(self, sampling: SamplingConfig | None = None, *, section: str = "rollout.") -> None:
        """Whether `engine` can sample like this, or as `sampling` says; see `check_engine_limits`."""
        check_engine_limits(sampling or self, self.engine, section=section)

    def _changed(self, changes: Mapping[str, float]) -> SamplingConfig:
        ours = {name: getattr(self, name) for name in SamplingConfig.model_fields}
        return SamplingConfig.model_validate({**ours, **changes})
