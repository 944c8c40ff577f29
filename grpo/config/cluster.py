"""The section `cluster` of a run's configuration: several devices that share every step. Imports neither torch nor Ray."""

from pydantic import Field

from ...section import Section


class ClusterConfig(Section):
    """How many workers share a step, and what happens when one of them is lost."""

    workers: int = Field(default=1, ge=1)
    """Workers, each with vLLM and the policy on a device of its own; a step's prompts are divided among them, so at most
    `optim.prompts_per_step`. 1: this process alone, without Ray."""

    cpus_per_worker: float = Field(default=1.0, gt=0)
    """CPU cores that Ray reserves for each worker; on CPU, also the threads it computes with."""

    gpus_per_worker: float | None = Field(default=None, ge=0)
    """GPUs that Ray reserves for each worker. None: 1 where the cluster has GPUs, else 0."""

    max_failures: int = Field(default=3, ge=0)
    """How often all workers start again from the newest checkpoint after one was lost: its process or its node has died, or a
    step took longer than `step_timeout`."""

    step_timeout: float = Field(default=1800.0, gt=0)
    """Seconds without a word between the workers after which they count as hung. A step, an evaluation and the copying of a
    checkpoint must each fit in."""
