"""The section `checkpoint`: when and where a run is saved, and whether the result is shared. Imports no torch."""

from pydantic import Field

from ...section import Section


class CheckpointConfig(Section):
    """Saving, so that a run can be resumed (`rankup train FILE --resume`)."""

    save_steps: int = Field(default=50, ge=0)
    """Save a checkpoint every `save_steps` steps, and after the last one. 0: only when a signal or an error ends the run."""

    save_epochs: float | None = Field(default=None, gt=0)
    """Save a checkpoint every so many passes over the training data, above 0; it sets `save_steps` once the data is loaded.
    None: `save_steps`."""

    keep_last: int = Field(default=2, ge=1)
    """Number of newest checkpoints to keep, at least 1 (TRL's `save_total_limit`)."""

    keep_best: int = Field(default=1, ge=0)
    """Number of best checkpoints to keep in addition: by evaluation reward, or, if `logging.eval_steps` is 0, by mean reward of
    the last ten steps."""

    storage: str | None = None
    """Folder that the run folder is copied to after every checkpoint and at the end, used by this run only: any fsspec path
    (`s3://bucket/runs/mine`, `/mnt/shared/mine`). `--resume` downloads missing files from there. None: no copy."""

    push_to_hub: bool = False
    """Upload adapter and tokenizer to the Hub when the run has ended. Needs `hf auth login`."""

    hub_model_id: str | None = Field(default=None, min_length=1)
    """Repository for `push_to_hub`, such as `me/mine`. None: the name of the run folder, in the account that is logged in."""

    hub_private_repo: bool | None = None
    """Whether `push_to_hub` makes a private repository, if it does not exist yet. None: the default of the account."""
