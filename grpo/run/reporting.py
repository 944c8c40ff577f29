"""Sends the metrics of a run to TensorBoard, Weights & Biases and trackio, in addition to `metrics.jsonl`.

    check_reports(["tensorboard", "wandb"])                          # before anything expensive starts
    reports = make_reports(["tensorboard", "wandb"], output_dir=Path("runs/mine"), run_name="mine", project="rankup",
                           config=config.model_dump(mode="json"))
    for report in reports:
        report.log({"step": 1, "reward": 0.12})                      # a row of metrics.jsonl
        states[report.name] = report.state_dict()                    # into the checkpoint; `make_reports(resume=states)`
        report.close()

| name        | where its data goes                                                                                |
|-------------|----------------------------------------------------------------------------------------------------|
| tensorboard | `<output_dir>/tensorboard`                                                                         |
| wandb       | the server that the user is logged in to, through `<output_dir>/wandb`; only that folder offline   |
| trackio     | trackio's folder: `$TRACKIO_DIR`, else `$HF_HOME/trackio` (`~/.cache/huggingface/trackio`)         |

The settings of the libraries apply (`wandb offline`, `TRACKIO_SPACE_ID`, ...). A missing library or login is an error at the
start. A tracker that fails later (its disk is full, its process was killed) logs one warning and gets no further rows: the run
continues, and `metrics.jsonl` has them all.
"""

import io
import math
import uuid
from collections.abc import Callable, Iterable, Mapping
from contextlib import redirect_stdout
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..common.errors import first_line
from ..common.log import logger
from ..common.quiet import quiet_stderr
from ..config.loading import dump_yaml

WANDB_FINISH_SECONDS = 300.0
"""How long the end of a run waits for the upload to Weights & Biases. `wandb sync` sends the rest."""


class Report:
    """One tracker of one run."""

    name: str
    """Its name in `logging.report_to`."""
    failures: tuple[type[Exception], ...] = (OSError,)
    """Errors of the library after which the run continues without this tracker."""

    def __init__(self) -> None:
        self._is_closed = False

    def log(self, row: Mapping[str, Any]) -> None:
        """Send a row of `metrics.jsonl`: `step` and metrics by name. None and values that are not finite are left out.

        Several rows may have the same step, and after a resumption steps may be repeated.
        """
        numbers = {name: float(value) for name, value in row.items() if name != "step" and value is not None}
        finite = {name: value for name, value in numbers.items() if math.isfinite(value)}
        if finite:
            self._attempt(lambda: self._write(int(row["step"]), finite))

    def state_dict(self) -> dict[str, Any]:
        """JSON types that a resumed run needs to continue the same tracker run."""
        return {}

    def close(self, *, failed: bool = False) -> None:
        """Send the remaining rows. `failed`: the run did not finish, for trackers that show it. A second call does nothing."""
        self._attempt(lambda: self._end(failed))
        self._is_closed = True

    def _attempt(self, action: Callable[[], None]) -> None:
        if self._is_closed:
            return
        try:
            action()
        except self.failures as error:
            self._is_closed = True
            logger.warning("%s gets no further rows; metrics.jsonl has them all: %s", self.name, first_line(error))

    def _write(self, step: int, values: dict[str, float]) -> None:
        raise NotImplementedError

    def _end(self, failed: bool) -> None:
        raise NotImplementedError


def check_reports(names: Iterable[str]) -> None:
    """Check that these trackers can be used here, without sending data.

    Raises:
        ValueError: a library is missing (with the command that installs it), or wandb is not logged in.
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
    """Open the trackers of a run.

    Args:
        output_dir: the run folder.
        config: the configuration in JSON types, section by section.
        resume: `state_dict` of each tracker by its name, if the run is resumed; None for a new run.
        resume_step: steps done when it resumes.

    Raises:
        ValueError: a tracker cannot be opened, with the fix.
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
    except BaseException:  # close the trackers that are open, then raise any error
        for report in reports:
            report.close(failed=True)
        raise
    return reports


class TensorBoardReport(Report):
    """Event files in `folder`: a scalar for each metric, the configuration as text.

    `purge_step`: values that an earlier part of the run wrote for this step and later ones are hidden. None: a new run.
    """

    name = "tensorboard"

    def __init__(self, folder: Path, *, config: Mapping[str, Any], purge_step: int | None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        super().__init__()
        self._writer = SummaryWriter(str(folder), purge_step=purge_step)
        lines = dump_yaml(dict(config)).splitlines()
        self._writer.add_text("config", "\n".join(f"    {line}" for line in lines), global_step=purge_step or 0)

    def _write(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()  # so that a killed run keeps its rows, and a full disk is an error immediately

    def _end(self, failed: bool) -> None:
        self._writer.close()


class WandbReport(Report):
    """A run on Weights & Biases, or only in `<output_dir>/wandb` if the user's settings say offline."""

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
            console="off",  # it would record the control characters of the live view
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
            raise ValueError(f"logging.report_to: wandb cannot start: {error}; `wandb offline` needs no server") from None
        # wandb's step may only increase, so it is not that of a resumed run: charts are drawn over the metric `step`.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def state_dict(self) -> dict[str, Any]:
        """The id of the run."""
        return {"id": self._run.id}

    def _write(self, step: int, values: dict[str, float]) -> None:
        self._run.log({"step": step, **values})

    def _end(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


class TrackioReport(Report):
    """A run in trackio's database of `project`.

    trackio resumes a run by its name, so random digits are added to `run_name`. It writes in a thread, which turns errors into
    warnings.
    """

    name = "trackio"

    def __init__(self, *, run_name: str, project: str, config: Mapping[str, Any], state: Mapping[str, Any]) -> None:
        import trackio

        super().__init__()
        self._name = state.get("name") or f"{run_name}-{uuid.uuid4().hex[:8]}"
        with redirect_stdout(io.StringIO()):  # trackio has no option to be silent
            self._run = trackio.init(project=project, name=self._name, config=dict(config), resume="allow", embed=False)

    def state_dict(self) -> dict[str, Any]:
        """The name of the run in trackio."""
        return {"name": self._name}

    def _write(self, step: int, values: dict[str, float]) -> None:
        self._run.log(values, step=step)

    def _end(self, failed: bool) -> None:
        import trackio

        with redirect_stdout(io.StringIO()):
            trackio.finish()


def _installed(library: str) -> bool:
    spec = find_spec(library)
    return spec is not None and spec.origin is not None  # a plain folder has no origin, such as `./wandb`


def _check_login() -> None:
    """Raise ValueError if wandb would ask for a key: the live view would hide the prompt."""
    import wandb

    with quiet_stderr():
        mode = wandb.setup().settings.mode
        logged_in = mode not in ("online", "run") or wandb.login(prompt=False, verify=False)
    if not logged_in:
        raise ValueError("logging.report_to: not logged in to wandb: run `wandb login`, or `wandb offline` to use none")
