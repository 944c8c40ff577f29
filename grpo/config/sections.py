"""The sections of a run's configuration, one pydantic model each; `config.py` puts them together. The adapter's,
the objective's, the guards' and the rewards' are in files of their own, `config_<section>.py`.

Each field says what it is, its unit and its bounds in the docstring below it. Names are those of TRL and PEFT where
they have the concept. Where one field bounds another, the validator stands with the field that comes second.
"""

import math
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from ...section import Section


class ModelConfig(Section):
    """The base model."""

    name: str = Field(default="smollm2-135m-instruct", min_length=1)
    """Model to train: `smollm2-135m-instruct` (embedded, offline), a local folder, or a hub id."""

    revision: str | None = None
    """Branch, tag or commit of a hub id. None: the default branch."""

    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Type of the base weights and of the adapter that vLLM samples with. Adapter masters are always float32."""

    load_in: Literal["nf4"] | None = None
    """Round the base's linear layers, but for the head, to 4 bits (NF4, bitsandbytes) for trainer and sampler: `nf4`. The
    trainer holds them packed; vLLM cannot and holds what they stand for, in `dtype`. None: as they are."""

    share_base_weights: Literal["auto"] | bool = "auto"
    """Build the trainer's model on vLLM's own base weights: `true`, `false`, or `auto`, which shares what vLLM keeps as it was
    loaded: on CUDA everything, on CPU all but the weights of linear layers. There `true` makes vLLM keep these too, which
    slows sampling down."""


class OptimConfig(Section):
    """AdamW, its schedule, and the size of a step."""

    learning_rate: float = Field(default=1e-4, gt=0)
    """Peak learning rate, above 0. LoRA takes about ten times that of full training; RL runs use 5e-6 to 1e-4."""

    rescale_learning_rate: bool = False
    """Take the learning rate as one for alpha 32 and make it mean the same at this rank and scale: B's rate times
    `32 / (scale * rank)`."""

    lora_plus_ratio: float = Field(default=1.0, gt=0)
    """B's learning rate over A's (LoRA+, 2402.12354), above 0."""

    embedding_learning_rate: float | None = Field(default=None, gt=0)
    """Learning rate of an adapter on the embedding, above 0, on the same schedule. None: 5e-5, or `learning_rate` where that
    is lower."""

    lr_scheduler_type: Literal["constant", "linear", "cosine"] = "constant"
    """Course of the learning rate after warm-up; `linear` and `cosine` fall to 0 at `max_steps`."""

    max_steps: int = Field(default=100, ge=1)
    """Steps of the run (batches of completions), at least 1."""

    warmup_steps: int = Field(default=0, ge=0)
    """Steps over which the learning rate rises from 0, below `max_steps`. LoRA starts at B = 0 and needs none."""

    prompts_per_step: int = Field(default=8, ge=1)
    """Prompts in a step; completions in a step are this times `rollout.num_generations`."""

    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradients are scaled down to this norm (over all adapters), above 0."""

    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw_8bit"] = "adamw"
    """AdamW's state: `adamw` takes 8 bytes an adapter parameter; `adamw_8bit` (bitsandbytes) 2, and 8 for an adapter on the
    embedding; `paged_adamw_8bit` as many, which CUDA moves to the host while memory is short. CUDA only."""

    adam_beta1: float = Field(default=0.9, ge=0, lt=1)
    """Decay of AdamW's first moment, [0, 1)."""

    adam_beta2: float = Field(default=0.95, ge=0, lt=1)
    """Decay of AdamW's second moment, [0, 1)."""

    adam_epsilon: float = Field(default=1e-8, gt=0)
    """Added to AdamW's denominator, above 0."""

    weight_decay: float = Field(default=0.0, ge=0)
    """AdamW's decoupled weight decay, at least 0."""

    tokens_per_pack: int = Field(default=4096, ge=1)
    """Token budget of one forward and backward pass; sets peak memory, not the update."""

    logits_mib: int | None = Field(default=None, ge=1)
    """Memory for the logits that are formed at a time, in MiB; fewer than 16 tokens' are never. None: 128 on CPU, 1024 on
    CUDA."""

    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""

    @field_validator("warmup_steps")
    @classmethod
    def _warmup_ends(cls, warmup_steps: int, info: ValidationInfo) -> int:
        max_steps = info.data.get("max_steps", math.inf)
        if warmup_steps >= max_steps:
            raise ValueError(f"must be below optim.max_steps, which is {max_steps} (got {warmup_steps})")
        return warmup_steps


class DataConfig(Section):
    """Prompts to train on and to evaluate with."""

    train: str | None = None
    """Training rows: a .json, .jsonl, .parquet or .csv file, a hub id, `reasoning_gym:<task>`, or a function that
    returns rows (`file.py:name`, `package.module:name`). None: the data set handed to `GRPOTrainer`."""

    eval: str | None = None
    """Evaluation rows, named in the same ways. None: no evaluation."""

    subset: str | None = None
    """Subset (configuration name) of a hub id, such as `main` of openai/gsm8k. None: its only one."""

    train_split: str = "train"
    """Split of a hub id to train on."""

    eval_split: str = "test"
    """Split of a hub id to evaluate on."""

    prompt_column: str = "prompt"
    """Column that holds the prompt: text, or a conversation (a list of role and content)."""

    system_prompt: str | None = None
    """System message put before each prompt; makes a conversation of a text prompt."""

    chat_template_kwargs: dict[str, Any] = {}
    """Keywords for the tokenizer's chat template, such as `enable_thinking: false`."""

    shuffle: bool = True
    """Draw prompts in a random order that `seed` decides, a new one each epoch (TRL's `shuffle_dataset`)."""

    eval_rows: int | None = Field(default=None, ge=1)
    """Evaluate on the first so many rows only. None: on all."""

    options: dict[str, Any] = {}
    """Options of a `reasoning_gym:<task>` source: `size`, `seed` and the task's own."""


class LoggingConfig(Section):
    """What a run shows and where it is kept."""

    run_name: str = Field(default="run", min_length=1, coerce_numbers_to_str=True)
    """Name of the run. None: the run file's name, else the last part of `output_dir`, else `run`."""

    output_dir: Path = Path("runs/run")
    """Folder for metrics, completions and the adapter. None: `runs/<run_name>`."""

    eval_steps: int = Field(default=0, ge=0)
    """Evaluate every so many steps. 0: only before and after training."""

    eval_before: bool = True
    """Evaluate before the first step."""

    completions_steps: int = Field(default=10, ge=0)
    """Show a few completions every so many steps. 0: never."""

    num_completions_to_print: int = Field(default=3, ge=1)
    """How many completions to show at a time, at least 1."""

    report_to: list[Literal["tensorboard", "wandb", "trackio"]] = []
    """Where metrics go besides `metrics.jsonl`: tensorboard, wandb, trackio. A single one will do, and `none` for none."""

    project: str = Field(default="rankup", min_length=1)
    """Project of the run on wandb and trackio."""

    profile_steps: list[Annotated[int, Field(ge=1)]] = []
    """Steps, counted from 1, that leave a profiler trace in `<output_dir>/profile`. A single one will do."""

    @field_validator("report_to", mode="before")
    @classmethod
    def _one_tracker_or_none(cls, report_to: object) -> object:
        names = [report_to] if isinstance(report_to, str) else report_to
        return [] if names == ["none"] else names

    @field_validator("report_to")
    @classmethod
    def _each_tracker_once(cls, report_to: list[str]) -> list[str]:
        return list(dict.fromkeys(report_to))

    @field_validator("profile_steps", mode="before")
    @classmethod
    def _one_step_will_do(cls, steps: object) -> object:
        return [steps] if isinstance(steps, int | float | str) else steps

    @model_validator(mode="before")
    @classmethod
    def _name_and_folder_from_each_other(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        names = ("run_name", "output_dir")
        given = {key: value for key, value in values.items() if value is not None or key not in names}
        name, folder = given.get("run_name"), given.get("output_dir")
        if folder is None and name is not None:
            given["output_dir"] = Path("runs") / str(name)
        if name is None and isinstance(folder, str | Path):
            given["run_name"] = Path(folder).name or "run"
        return given


class CheckpointConfig(Section):
    """What a run can go on from after an interruption (`rankup train FILE --resume`)."""

    save_steps: int = Field(default=50, ge=0)
    """Save a checkpoint every so many steps, and after the last one. 0: only when a signal or an error ends the run."""

    keep_last: int = Field(default=2, ge=1)
    """Checkpoints to keep: so many of the newest, at least 1 (TRL's `save_total_limit`)."""

    keep_best: int = Field(default=1, ge=0)
    """Checkpoints to keep besides: so many with the highest evaluation, or, where `logging.eval_steps` is 0, with the highest
    mean reward of the last ten steps."""

    storage: str | None = None
    """Where the run folder is copied to after every checkpoint and at the end: a folder of its own at any fsspec path
    (`s3://bucket/runs/mine`, `/mnt/shared/mine`). `--resume` takes from there what is missing here. None: nowhere."""
