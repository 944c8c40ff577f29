"""The section `logging`: run folder, evaluation and display. Imports no torch."""

from os.path import expanduser
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from ...section import Section


class LoggingConfig(Section):
    """Run folder, evaluation and display."""

    run_name: str = Field(default="run", min_length=1, coerce_numbers_to_str=True)
    """Name of the run. None: the run file's name, else the last part of `output_dir`, else `run`. Without an `output_dir` it
    names a folder inside of `runs`."""

    output_dir: Path = Path("runs/run")
    """Folder for metrics, completions and the adapter. None: `runs/<run_name>`."""

    working_dir: Path | None = None
    """Folder that the relative paths of a saved `config.yaml` start from. A run sets it to its working directory."""

    eval_steps: int = Field(default=0, ge=0)
    """Evaluate every `eval_steps` steps. 0: only before and after training."""

    eval_epochs: float | None = Field(default=None, gt=0)
    """Evaluate every so many passes over the training data, above 0; it sets `eval_steps` once the data is loaded. None:
    `eval_steps`."""

    eval_before: bool = True
    """Evaluate before the first step."""

    completions_steps: int = Field(default=10, ge=0)
    """Show a few completions every `completions_steps` steps. 0: never."""

    num_completions_to_print: int = Field(default=3, ge=1)
    """Number of completions to show each time, at least 1."""

    report_to: list[Literal["tensorboard", "wandb", "trackio"]] = Field(default=[])
    """Trackers for metrics, in addition to `metrics.jsonl`: tensorboard, wandb, trackio; a list or a single name, or `none`."""

    project: str = Field(default="rankup", min_length=1)
    """Project of the run in wandb and trackio."""

    profile_steps: list[Annotated[int, Field(ge=1)]] = Field(default=[])
    """Steps to profile, counted from 1: a list or a single number. Traces are written to `<output_dir>/profile`."""

    @field_validator("output_dir")
    @classmethod
    def _home(cls, folder: Path) -> Path:
        return Path(expanduser(folder))

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
    def _list_or_single_step(cls, steps: object) -> object:
        return [steps] if isinstance(steps, int | float | str) else steps

    @model_validator(mode="before")
    @classmethod
    def _name_and_folder_from_each_other(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        names = ("run_name", "output_dir")
        values = {key: value for key, value in values.items() if value is not None or key not in names}
        name, folder = values.get("run_name"), values.get("output_dir")
        if folder is None and name is not None:
            path = Path(str(name))
            if name and (path.is_absolute() or ".." in path.parts or not path.parts):
                raise ValueError(f"run_name must name a folder inside of runs (got {name!r}): set output_dir too")
            values["output_dir"] = Path("runs") / str(name)
        if name is None and isinstance(folder, str | Path):
            values["run_name"] = Path(folder).name or "run"
        return values
