"""The section `checkpoint` of a run's configuration: what a run can be resumed from. Imports no torch."""

from pydantic import Field

from ...section import Section


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
