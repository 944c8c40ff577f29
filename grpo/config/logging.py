"""The section `logging` of a run's configuration: what a run shows and where it is kept. Imports no torch."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from ...section import Section


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

    report_to: list[Literal["tensorboard", "wandb", "trackio"]] = Field(default=[])
    """Where metrics go besides `metrics.jsonl`: tensorboard, wandb, trackio. A single one will do, and `none` for none."""

    project: str = Field(default="rankup", min_length=1)
    """Project of the run on wandb and trackio."""

    profile_steps: list[Annotated[int, Field(ge=1)]] = Field(default=[])
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
