"""Sends a run's metrics to TensorBoard, Weights & Biases and trackio, beside the `metrics.jsonl` that every run writes.

    check_reports(["tensorboard", "wandb"])                          # before anything expensive starts
    reports = make_reports(["tensorboard", "wandb"], output_dir=Path("runs/mine"), run_name="mine", project="rankup",
                           config=config.model_dump(mode="json"))
    for report in reports:
        report.log({"step": 1, "reward": 0.12})                      # a row of metrics.jsonl
        states[report.name] = report.state_dict()                    # into the checkpoint; `make_reports(resume=states)`
        report.close()

| name        | where its data goes                                                                                    |
|-------------|--------------------------------------------------------------------------------------------------------|
| tensorboard | `<output_dir>/tensorboard`                                                                             |
| wandb       | the server that the user is logged in to, through `<output_dir>/wandb`; that folder alone when offline |
| trackio     | trackio's own folder: `$TRACKIO_DIR`, else `$HF_HOME/trackio` (`~/.cache/huggingface/trackio`)         |

Each library keeps its own settings (`wandb offline`, `TRACKIO_SPACE_ID`, ...). What cannot work is refused at the start. A
tracker that fails later (its disk is full, its process was killed) says so in one warning and gets no further rows: the run
goes on, and `metrics.jsonl` has them all.
"""

import io
import math
import uuid
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import redirect_stdout
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from ..common.quiet import quiet_stderr
from ..config.loading import dump_yaml

WANDB_FINISH_SECONDS = 300.0
"""How long the end of a run waits for Weights & Biases to take what it has not yet taken. `wandb sync` sends the rest."""


class Report(Protocol):
    """One tracker of one run."""

    name: str
    """What `logging.report_to` calls it."""

    def log(self, row: Mapping[str, Any]) -> None:
        """Sends a row of `metrics.jsonl`: `step` and metrics by name. None and what is not finite are left out.

        Several rows may have the same step, and after a resumption steps may come again.
        """
        ...

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to go on in the same place, in JSON's types."""
        ...

    def close(self, *, failed: bool = False) -> None:
        """Sends what is left. failed: the run did not come to its end, for trackers that show it."""
        ...


def check_reports(names: Iterable[str]) -> None:
    """Looks whether these trackers can work here; sends nothing.

    Raises ValueError where a library is missing (with the command that installs it) or nobody is logged in to wandb.
    """
    names = list(names)
    missing = [name for name in names if not _installed(name)]
    if missing:
        raise ValueError(f"logging.report_to: {' and '.join(missing)} not installed: pip install {' '.join(missing)}")
    if "wandb" in names:
        _check_login()


def make_reports(
    names: Iterable[str],
    *,
    output_dir: Path,
    run_name: str,
    project: str,
    config: Mapping[str, Any],
    resume: Mapping[str, Mapping[str, Any]] | None = None,
    resume_step: int = 0,
) -> list[Report]:
    """Opens trackers for a run, whose folder is `output_dir`.

    config: the run's configuration in JSON's types, section by section.
    resume: `state_dict` by name of the run that goes on. None: a new run. resume_step: the last step that stays done.

    Raises ValueError where a tracker cannot be opened, with what to do about it.
    """
    reports: list[Report] = []
    try:
        for name in names:
            state = None if resume is None else resume.get(name, {})
            if name == "tensorboard":
                purge_step = None if state is None else resume_step + 1
                reports.append(TensorBoardReport(output_dir / "tensorboard", config=config, purge_step=purge_step))
            elif name == "wandb":
                reports.append(WandbReport(output_dir, run_name=run_name, project=project, config=config, state=state or {}))
            else:
                assert name == "trackio", name
                reports.append(TrackioReport(run_name=run_name, project=project, config=config, state=state or {}))
    except BaseException:  # whatever it was: what is open already must not stay open
        for report in reports:
            report.close(failed=True)
        raise
    return reports


class _Tracker:
    """What the trackers share: which values are sent, and an end with a warning where the library fails."""

    name: str
    failures: tuple[type[Exception], ...] = (OSError,)

    def __init__(self) -> None:
        self._stopped = False

    def log(self, row: Mapping[str, Any]) -> None:
        """See `Report.log`."""
        numbers = {name: float(value) for name, value in row.items() if name != "step" and value is not None}
        finite = {name: value for name, value in numbers.items() if math.isfinite(value)}
        if finite:
            self._attempt(lambda: self._write(int(row["step"]), finite))

    def close(self, *, failed: bool = False) -> None:
        """See `Report.close`. A second call does nothing."""
        self._attempt(lambda: self._end(failed))
        self._stopped = True

    def _attempt(self, action: Callable[[], None]) -> None:
        if self._stopped:
            return
        try:
            action()
        except self.failures as error:
            self._stopped = True
            text = f"{self.name} gets no further rows; metrics.jsonl has them all: {str(error) or type(error).__name__}"
            warnings.warn(text, RuntimeWarning, stacklevel=3)

    def _write(self, step: int, values: dict[str, float]) -> None:
        raise NotImplementedError

    def _end(self, failed: bool) -> None:
        raise NotImplementedError


class TensorBoardReport(_Tracker):
    """Event files in `folder`: a scalar for each metric, the configuration as text.

    purge_step: what an earlier part of the run wrote at this step and later is hidden. None: a new run.
    """

    name = "tensorboard"

    def __init__(self, folder: Path, *, config: Mapping[str, Any], purge_step: int | None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        super().__init__()
        self._writer = SummaryWriter(str(folder), purge_step=purge_step)
        lines = dump_yaml(dict(config)).splitlines()
        self._writer.add_text("config", "\n".join(f"    {line}" for line in lines), global_step=purge_step or 0)

    def state_dict(self) -> dict[str, Any]:
        """Nothing: the folder says it all."""
        return {}

    def _write(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()  # a run that is killed keeps its rows, and a full disk is told at once

    def _end(self, failed: bool) -> None:
        self._writer.close()


class WandbReport(_Tracker):
    """A run on Weights & Biases, or in `<output_dir>/wandb` alone where the user's own settings say offline."""

    name = "wandb"

    def __init__(
        self, output_dir: Path, *, run_name: str, project: str, config: Mapping[str, Any], state: Mapping[str, Any]
    ) -> None:
        import wandb

        super().__init__()
        self.failures = (OSError, wandb.Error)
        _check_login()
        settings = wandb.Settings(
            silent=True,
            console="off",  # its copy of the terminal would be the live view's control characters
            finish_timeout=WANDB_FINISH_SECONDS,
            finish_timeout_raises=True,
        )
        try:
            with quiet_stderr():
                self._run = wandb.init(
                    project=project,
                    name=run_name,
                    config=dict(config),
                    id=state.get("id"),
                    resume="allow",
                    dir=str(output_dir),
                    settings=settings,
                )
        except wandb.Error as error:
            raise ValueError(f"logging.report_to: wandb cannot start: {error}; `wandb offline` does without it") from None
        # Its own step may only grow and is not the run's: charts are drawn over the metric `step`.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def state_dict(self) -> dict[str, Any]:
        """The run's id."""
        return {"id": self._run.id}

    def _write(self, step: int, values: dict[str, float]) -> None:
        self._run.log({"step": step, **values})

    def _end(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


class TrackioReport(_Tracker):
    """A run in trackio's database of `project`.

    A name is all that trackio knows a run by when it resumes one, so each run's has random digits behind `run_name`.
    It writes from a thread of its own, which turns what goes wrong into warnings.
    """

    name = "trackio"

    def __init__(self, *, run_name: str, project: str, config: Mapping[str, Any], state: Mapping[str, Any]) -> None:
        import trackio

        super().__init__()
        self._name = state.get("name") or f"{run_name}-{uuid.uuid4().hex[:8]}"
        with redirect_stdout(io.StringIO()):  # it has no option for silence
            self._run = trackio.init(project=project, name=self._name, config=dict(config), resume="allow", embed=False)

    def state_dict(self) -> dict[str, Any]:
        """The run's name in trackio."""
        return {"name": self._name}

    def _write(self, step: int, values: dict[str, float]) -> None:
        self._run.log(values, step=step)

    def _end(self, failed: bool) -> None:
        import trackio

        with redirect_stdout(io.StringIO()):
            trackio.finish()


def _installed(library: str) -> bool:
    spec = find_spec(library)
    return spec is not None and spec.origin is not None  # without origin it is a mere folder, such as wandb's own `./wandb`


def _check_login() -> None:
    """Raises ValueError where wandb would have to ask for a key: a prompt in the live view is one that nobody sees."""
    import wandb

    with quiet_stderr():
        mode = wandb.setup().settings.mode
        logged_in = mode not in ("online", "run") or wandb.login(prompt=False, verify=False)
    if not logged_in:
        raise ValueError("logging.report_to: nobody is logged in to wandb: run `wandb login`, or `wandb offline` to do without")
