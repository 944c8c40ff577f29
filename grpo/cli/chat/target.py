"""What a chat is with: a run, a checkpoint of one, an adapter, or a model alone; and the configuration of its engine.

    target = find_target("runs/quickstart", ["rollout.temperature=0.7"], context=None)
    target.config, target.model_path, target.adapters, target.first
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from os.path import expanduser
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from ....rollout.model_limits import check_model_dtype, check_model_limits, context_length
from ...common.model_files import ADAPTER_CONFIG, resolve_model
from ...common.quiet import quiet_stderr
from ...config import GRPOConfig, load_config, make_config, with_options
from ...data.messages import messages_in
from ...data.run_inputs import with_template_text
from ...data.tokenizers import load_tokenizer
from ...model.start import resolve_start
from ...run.run_folder import CONFIG_FILE
from .adapters import FINAL, Adapters

USUAL_CONTEXT = 4096
"""Tokens of a conversation, if the run does not need more and the model has as many."""

OF_A_CHAT = ("rollout.max_num_seqs=2", "rollout.gpu_memory_utilization=0.9", "rollout.release_kv_cache=false")
"""Two answers at a time, and no trainer beside the engine. Overrides of the user come after these."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """See the module's docstring.

    Attributes:
        name: as the user wrote it.
        kind: what it is.
        config: of the engine; its lengths are those of the conversation.
        max_tokens: of an answer, to begin with.
        adapters: to switch between; None: a model alone.
        first: the name of the adapter to begin with.
        text_reason: why messages are prompts of plain text, each by itself; None: they are a conversation.
    """

    name: str
    kind: str
    config: GRPOConfig
    model_path: str
    tokenizer: Any
    max_tokens: int
    adapters: Adapters | None
    first: str
    text_reason: str | None


def find_target(name: str, overrides: Sequence[str], *, context: int | None) -> Target:
    """Read what there is on disk; starts nothing.

    Args:
        context: tokens that the engine has room for, answer included; None: `USUAL_CONTEXT`, or what the run needs.

    Raises:
        ValueError, FileNotFoundError: it is none of these, cannot be sampled from like this, or acts in an environment.
    """
    path = Path(expanduser(name))
    if path.is_file():
        raise ValueError(f"{name} is a file: give a run folder, a model, or the folder of an adapter")
    run, step = _run_of(path)
    adapters, first = None, FINAL
    if run is not None:
        kind, adapters = "run", Adapters.of_run(run)
        first = adapters.first.name if step is None else str(step)
        config = load_config(path / CONFIG_FILE, ["lora.start_from=null", *OF_A_CHAT, *overrides])
    elif (path / ADAPTER_CONFIG).is_file() and not (path / "config.json").is_file():
        kind, adapters = "adapter", Adapters.of_folder(path)
        first = adapters.first.name
        config = _config_of_adapter(name, path, overrides)
    else:
        kind = "model"
        if path.is_dir() and not (path / "config.json").is_file():
            raise ValueError(
                f"{name} is no run folder ({CONFIG_FILE}), no adapter ({ADAPTER_CONFIG}) and no model (config.json)"
            )
        config = make_config({"model": {"name": name}}, [*OF_A_CHAT, *overrides])
    if config.rollout.environment is not None:
        raise ValueError(
            f"the completions of {name} act in an environment, which a chat does not have: add "
            "rollout.environment=null to talk without it; `rankup eval` plays it"
        )
    return _prepared(name, kind, run, config, adapters, first, context)


def _prepared(
    name: str, kind: str, run: Path | None, config: GRPOConfig, adapters: Adapters | None, first: str, context: int | None
) -> Target:
    config = with_template_text(config)
    if adapters is not None:
        adapters.load(adapters.find(first))
    model_path = _model_path(name, kind, config)
    if config.lora.start_from is not None:
        config, _ = resolve_start(config, model_path)
        config = with_options(config, {"lora": {"start_from": None}})
    with quiet_stderr():
        tokenizer = load_tokenizer(config, model_path)
    config, max_tokens = _with_context(config, model_path, context)
    check_model_limits(config.rollout, model_path, tokenizer)
    check_model_dtype(model_path, config.model.dtype)
    return Target(
        name=name,
        kind=kind,
        config=config,
        model_path=model_path,
        tokenizer=tokenizer,
        max_tokens=max_tokens,
        adapters=adapters,
        first=first,
        text_reason=_text_reason(config, tokenizer, run),
    )


def _run_of(path: Path) -> tuple[Path | None, int | None]:
    """The run folder, and the steps of a checkpoint if the path is that of one; None: it is no run."""
    from ...checkpoint.store import NAME, step_of

    if not (path / CONFIG_FILE).is_file() or (path / "config.json").is_file():
        return None, None
    resolved = path.resolve()
    if resolved.parent.name == "checkpoints" and NAME.fullmatch(resolved.name):
        return resolved.parents[1], step_of(resolved.name)
    return path, None


def _config_of_adapter(name: str, folder: Path, overrides: Sequence[str]) -> GRPOConfig:
    """Its base model, and the adapter's ranks, scales and targets, which `resolve_start` reads."""
    try:
        values = dict(json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ValueError(f"the adapter in {name} is damaged: {ADAPTER_CONFIG} is no JSON mapping") from error
    base = values.get("base_model_name_or_path")
    if not base and not any(one.startswith(("model=", "model.name=")) for one in overrides):
        raise ValueError(f"{name}/{ADAPTER_CONFIG} names no base model: add model=NAME")
    model = {"name": base, "revision": values.get("revision")} if base else {}
    return make_config({"model": model, "lora": {"start_from": str(folder)}}, [*OF_A_CHAT, *overrides])


def _model_path(name: str, kind: str, config: GRPOConfig) -> str:
    try:
        with quiet_stderr():
            return resolve_model(config.model.name, revision=config.model.revision)
    except ValueError as error:
        if kind == "model":
            raise
        raise ValueError(f"{error} (the base model of {name}; model=NAME names another place)") from error


def _with_context(config: GRPOConfig, model_path: str, context: int | None) -> tuple[GRPOConfig, int]:
    """The configuration with room for a conversation instead of a prompt, and the most tokens of an answer."""
    longest = context_length(AutoConfig.from_pretrained(model_path))
    if context is not None and longest is not None and context > longest:
        raise ValueError(f"--context: must be at most {longest}, the context of the model (got {context})")
    if context is None:
        context = max(config.rollout.max_model_length, USUAL_CONTEXT)
        context = context if longest is None else min(context, longest)
    of_answer = min(config.rollout.max_completion_length, context - 1)
    lengths = {"max_prompt_length": context - of_answer, "max_completion_length": of_answer}
    return with_options(config, {"rollout": lengths}), of_answer


def _text_reason(config: GRPOConfig, tokenizer: Any, run: Path | None) -> str | None:
    if config.rollout.tools:
        return None
    if not tokenizer.chat_template:
        return "the model has no chat template"
    if run is not None and config.data.system_prompt is None and _was_trained_on_text(run):
        return "the run was trained on prompts of plain text (data.system_prompt=TEXT uses the chat template)"
    return None


def _was_trained_on_text(run: Path) -> bool:
    """Whether the prompts that the run has recorded are texts; False if it has recorded none."""
    import pyarrow.parquet

    files = sorted((run / "completions").glob("step_*.parquet"))
    if not files:
        return False
    prompts = pyarrow.parquet.read_table(files[0], columns=["prompt"])["prompt"].to_pylist()
    return any(messages_in(prompt) is None for prompt in prompts[:1])
