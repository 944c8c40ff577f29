"""From TRL's names to ours.

    script = convert({"per_device_train_batch_size": 4, "optim": {"learning_rate": 1e-5}})
    script.values       # {"optim": {"learning_rate": 1e-5, "prompts_per_step": ..., "num_train_epochs": 3.0}, "rollout": ...}
    script.notes        # what the user should know

It takes nested values, in which every name that only needs another place has it already (`loading.nest`). Each function here
converts the fields of one subject.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from pydantic import ValidationError

from ....rollout.config import SamplingConfig
from ....rollout.generation_kwargs import OPTIONS, GenerationKwargs
from .batch import Batch, batch_of
from .fields import ALL_NAMES, BATCH_FIELDS, FIELDS
from .script import Script, Value, mapping, positive

OPTIMIZERS = {
    "adamw_torch": "adamw",
    "adamw_torch_fused": "adamw",
    "adamw_hf": "adamw",
    "adamw_bnb_8bit": "adamw_8bit",
    "adamw_torch_8bit": "adamw_8bit",
    "paged_adamw": "adamw",
    "paged_adamw_32bit": "adamw",
}
"""transformers' names of optimizers that have another name here. Paging changes where the state is, not the update."""

GENERATION_KWARGS = {
    **{name: option for name, option in OPTIONS.items() if option.startswith("rollout.") and name != "n"},
    "stop_strings": "rollout.stop",
    "max_new_tokens": "rollout.max_completion_length",
}
"""Keys of TRL's `generation_kwargs` that are options here: arguments of vLLM's SamplingParams, and two of transformers."""

RENAMED_KWARGS = {"min_new_tokens": "min_tokens"}
"""transformers' names of arguments of vLLM."""

KWARGS_WITHOUT_EFFECT = (("do_sample", True), ("num_beams", 1), ("n", 1), ("use_cache", True))
"""Keys with a value that says what is done anyway."""

DECIDED_HERE = frozenset({"attn_implementation", "device_map", "low_cpu_mem_usage", "use_cache"})
"""Keys of TRL's `model_init_kwargs` without effect: how the model is placed and computed."""

DEFAULT_STEPS = 100
"""The default of `optim.max_steps`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Converted:
    """The values by our names; notes for the user; whether the script has a batch in TRL's terms; the values by TRL's names."""

    values: dict[str, Value]
    notes: tuple[str, ...] = field(default=())
    has_trl_batch: bool = False
    given: Mapping[str, Value] = field(default_factory=dict)


def convert(values: Mapping[str, Value]) -> Converted:
    """The same options without TRL's names.

    Raises:
        ValueError: options that are not supported, or contradict each other; one line per problem.
    """
    script = Script(values)
    problems = [_refusal(name, script.trl(name)) for name in script.names]
    errors = [problem for problem in problems if problem]
    batch = Batch(prompts_per_step=0, num_iterations=1)
    try:
        _generation_kwargs(script)  # before the defaults of TRL's batch
        batch = _batch(script) or batch
    except ValueError as error:
        errors.append(str(error))
    converters: tuple[Callable[[Script], None], ...] = (_model, _optimizer, _sampling, _correction, _evaluation, _saving, _best)
    for converter in converters:
        try:
            converter(script)
        except ValueError as error:
            errors.append(str(error))
    try:
        _steps(script, batch)
    except ValueError as error:
        errors.append(str(error))
    if errors:
        raise ValueError("\n".join(errors))
    return Converted(
        values=script.values,
        notes=_notes(script),
        has_trl_batch=any(name in BATCH_FIELDS for name in script.names),
        given=script.given,
    )


def _refusal(name: str, value: Value) -> str | None:
    """Why a value is not supported; None if it is, or asks for nothing."""
    known = ALL_NAMES[name]
    if known.kind != "refused" or value in (None, False, "", 0) or value == known.default:
        return None
    return f"{name}: is not supported; {known.note}"


def _notes(script: Script) -> tuple[str, ...]:
    """One line about the options without effect of which the reader of a script would expect one."""
    without_effect = [
        f"{name} ({FIELDS[name].note})"
        for name in FIELDS
        if FIELDS[name].is_reported and script.trl(name) not in (None, FIELDS[name].default)
    ]
    return (f"no effect here: {'; '.join(without_effect)}",) if without_effect else ()


def _batch(script: Script) -> Batch | None:
    """The batch, with TRL's amounts where the script names none; None if no field of TRL's batch is set."""
    named = [name for name in BATCH_FIELDS if script.trl(name) is not None]
    if not named:
        return None

    def of_trl(name: str) -> int | None:
        value = FIELDS[name].default if script.trl(name) is None else script.trl(name)
        return None if value is None else positive(value, name)

    def of_ours(dotted: str, default: int) -> int:
        return positive(script.ours(dotted) or default, dotted)

    if script.ours("optim.prompts_per_step") is not None:
        raise ValueError(f"{named[0]}: sets optim.prompts_per_step, which is set too; keep one of them")
    generations = of_ours("rollout.num_generations", 8)
    batch = batch_of(
        per_device=of_trl("per_device_train_batch_size") or 1,
        accumulation=of_trl("gradient_accumulation_steps") or 1,
        per_generation=of_trl("steps_per_generation"),
        generation=of_trl("generation_batch_size"),
        generations=generations,
        iterations=of_ours("algorithm.num_iterations", 1),
        workers=of_ours("cluster.workers", 1),
    )
    script.replace("optim.prompts_per_step", batch.prompts_per_step)
    script.replace("algorithm.num_iterations", batch.num_iterations)
    script.replace("rollout.num_generations", generations)
    if script.ours("rollout.max_completion_length") is None:
        script.replace("rollout.max_completion_length", FIELDS["max_completion_length"].default)
    if script.ours("optim.max_steps") in (None, -1, "-1") and script.ours("optim.num_train_epochs") is None:
        script.replace("optim.num_train_epochs", FIELDS["num_train_epochs"].default)
    return batch


def _model(script: Script) -> None:
    """`fp16` or `bf16` decides the type; else that of `model_init_kwargs`."""
    bf16, fp16, text = script.trl("bf16"), script.trl("fp16"), script.trl("model_init_kwargs")
    if bf16 and fp16:
        raise ValueError("fp16: bf16 is set too; keep one of them")
    if fp16:
        script.set("model.dtype", "float16", by="fp16")
    elif bf16 is not None:
        script.set("model.dtype", "bfloat16" if bf16 else "float32", by="bf16")
    kwargs = {} if text is None else mapping(text, "model_init_kwargs")
    for name, value in kwargs.items():
        if name in ("dtype", "torch_dtype"):
            dtype = str(value).removeprefix("torch.")
            if bf16 is None and not fp16 and dtype != "auto":
                script.set("model.dtype", dtype, by=f"model_init_kwargs.{name}")
        elif name == "revision":
            script.set("model.revision", value, by="model_init_kwargs.revision")
        elif name == "quantization_config" and value is not None:
            raise ValueError("model_init_kwargs.quantization_config: is not supported; set model.load_in=nf4 for 4 bits")
        elif name not in DECIDED_HERE and value:
            raise ValueError(f"model_init_kwargs.{name}: is not supported; dtype and revision are")


def _optimizer(script: Script) -> None:
    optimizer, kwargs = script.ours("optim.optimizer"), script.ours("optim.lr_scheduler_kwargs")
    if isinstance(optimizer, str):
        script.replace("optim.optimizer", OPTIMIZERS.get(optimizer, optimizer))
    if isinstance(kwargs, str):
        script.replace("optim.lr_scheduler_kwargs", mapping(kwargs, "lr_scheduler_kwargs"))


def _generation_kwargs(script: Script) -> None:
    """Keys that are options here become these.

    Raises:
        ValueError: the option, or another key for the same, has another value.
    """
    given, regex = script.ours("rollout.generation_kwargs"), script.trl("vllm_structured_outputs_regex")
    given = given.model_dump(exclude_unset=True) if isinstance(given, GenerationKwargs) else given
    kwargs: dict[str, Value] = {}
    for name, value in ({} if given is None else mapping(given, "generation_kwargs")).items():
        if name in GENERATION_KWARGS:
            option = GENERATION_KWARGS[name]
            set_already = script.ours(option)
            if value is not None and set_already is not None and not _are_equal(option, value, set_already):
                raise ValueError(f"generation_kwargs.{name}: is the same option as {option}, set to {set_already!r}; keep one")
            script.replace(option, set_already if value is None else value)
        elif (name, value) not in KWARGS_WITHOUT_EFFECT:
            renamed = RENAMED_KWARGS.get(name, name)
            if kwargs.setdefault(renamed, value) != value:
                raise ValueError(f"generation_kwargs.{name}: is the same option as {renamed}, with another value; keep one")
    if regex is not None and kwargs.setdefault("structured_outputs", {"regex": regex}) != {"regex": regex}:
        raise ValueError("vllm_structured_outputs_regex: generation_kwargs has other structured_outputs; keep one of them")
    script.replace("rollout.generation_kwargs", kwargs or None)


def _are_equal(option: str, one: Value, other: Value) -> bool:
    """Whether two values mean the same for an option of `rollout`, such as a text and a list of it."""
    name = option.removeprefix("rollout.")
    try:
        return getattr(SamplingConfig(**{name: one}), name) == getattr(SamplingConfig(**{name: other}), name)
    except ValidationError:  # reported by the option's own check
        return one == other


def _sampling(script: Script) -> None:
    """What samples, how, and how long a sequence may be."""
    use_vllm, template, longest = (
        script.trl("use_vllm"),
        script.ours("data.chat_template_kwargs"),
        script.trl("vllm_max_model_length"),
    )
    if use_vllm is not None:
        script.set("rollout.engine", "vllm" if use_vllm else "torch", by="use_vllm")
    if isinstance(template, str):
        script.replace("data.chat_template_kwargs", mapping(template, "chat_template_kwargs"))
    if longest is not None and script.ours("rollout.max_prompt_length") is None:
        completion = positive(script.ours("rollout.max_completion_length") or 256, "rollout.max_completion_length")
        prompt = positive(longest, "vllm_max_model_length") - completion
        if prompt < 1:
            limit = f"must be above max_completion_length, which is {completion}"
            raise ValueError(f"vllm_max_model_length: {limit} (got {longest})")
        script.replace("rollout.max_prompt_length", prompt)


def _correction(script: Script) -> None:
    """A lower limit needs the mode that masks outside of two limits."""
    clip_min, mode = script.trl("vllm_importance_sampling_clip_min"), script.ours("correction.mode")
    if clip_min is None:
        return
    if mode not in ("token_mask", "icepop"):
        raise ValueError(
            "vllm_importance_sampling_clip_min: only vllm_importance_sampling_mode='token_mask' has a lower limit here: set "
            "it, or leave the limit out"
        )
    script.replace("correction.mode", "icepop")
    script.set("correction.floor", clip_min, by="vllm_importance_sampling_clip_min")


def _evaluation(script: Script) -> None:
    strategy, on_start, shown = script.trl("eval_strategy"), script.trl("eval_on_start"), script.trl("log_completions")
    logging_steps = script.trl("logging_steps") or FIELDS["logging_steps"].default
    if on_start is not None:
        script.set("logging.eval_before", on_start, by="eval_on_start")
    match strategy:
        case None:
            pass
        case "no":  # as in TRL, eval_steps has no effect then
            script.replace("logging.eval_steps", 0)
        case "steps":
            script.replace("logging.eval_steps", script.ours("logging.eval_steps") or logging_steps)
        case "epoch":
            script.replace("logging.eval_steps", None)
            script.set("logging.eval_epochs", 1.0, by="eval_strategy")
        case _:
            raise ValueError(f"eval_strategy: must be no, steps or epoch (got {strategy!r})")
    if strategy is not None and script.ours("logging.eval_before") is None:  # the default of eval_on_start
        script.replace("logging.eval_before", False)
    if shown is not None:
        script.set("logging.completions_steps", logging_steps if shown else 0, by="log_completions")


def _saving(script: Script) -> None:
    match script.trl("save_strategy"):
        case None | "steps":
            pass
        case "no":
            script.replace("checkpoint.save_steps", 0)
        case "epoch":
            script.replace("checkpoint.save_steps", None)
            script.set("checkpoint.save_epochs", 1.0, by="save_strategy")
        case "best":
            raise ValueError(
                "save_strategy: best is not supported; set steps: checkpoint.keep_best of them are the best ones, and "
                "load_best_model_at_end ends with the best policy"
            )
        case other:
            raise ValueError(f"save_strategy: must be no, steps or epoch (got {other!r})")


def _best(script: Script) -> None:
    """Only the mean reward of the evaluation can be the measure."""
    metric, is_greater = script.trl("metric_for_best_model"), script.trl("greater_is_better")
    if metric is not None and metric not in ("reward", "eval_reward"):
        raise ValueError(f"metric_for_best_model: must be eval_reward, the mean reward of the evaluation (got {metric!r})")
    if is_greater is False:
        raise ValueError("greater_is_better: must be true: the best evaluation has the highest mean reward")


def _steps(script: Script, batch: Batch) -> None:
    """Lengths in TRL's optimizer steps become steps; shares of the run too, or epochs if these determine its length."""
    max_steps, warmup = _as_number(script.ours("optim.max_steps")), _as_number(script.ours("optim.warmup_steps"))
    max_steps = None if max_steps == -1 else max_steps
    if max_steps is not None and batch.num_iterations > 1:
        max_steps = batch.steps(max_steps)
        script.replace("optim.max_steps", max_steps)
    if warmup is not None and 0 < warmup < 1:
        script.replace("optim.warmup_steps", None)
        script.set("optim.warmup_ratio", warmup, by="warmup_steps")
    elif warmup is not None and batch.num_iterations > 1:
        script.replace("optim.warmup_steps", batch.steps(warmup))
    epochs = _as_number(script.ours("optim.num_train_epochs")) if max_steps is None else None
    for dotted, in_epochs in (
        ("logging.eval_steps", "logging.eval_epochs"),
        ("checkpoint.save_steps", "checkpoint.save_epochs"),
        ("logging.completions_steps", None),
    ):
        every = _as_number(script.ours(dotted))
        if every is None:
            continue
        if 0 < every < 1 and epochs is not None and in_epochs is not None:
            script.replace(dotted, None)
            script.set(in_epochs, every * epochs, by=dotted.partition(".")[2])
        elif 0 < every < 1:
            script.replace(dotted, math.ceil((max_steps or DEFAULT_STEPS) * every))
        elif batch.num_iterations > 1:
            script.replace(dotted, batch.steps(every))


def _as_number(value: Value) -> float | None:
    """A number, also as text; None for anything else, which the option's own check reports."""
    try:
        return None if value is None or isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        return None
