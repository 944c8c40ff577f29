"""The section `cluster`: several devices that share every step. Imports neither torch nor Ray."""

from pydantic import Field, field_validator

from ...section import Section


class ClusterConfig(Section):
    """Number of workers that share a step, and what happens when one is lost."""

    workers: int = Field(default=1, ge=1)
    """Workers, each with vLLM and the policy on its own device. The prompts of a step are divided among them, so at most
    `optim.prompts_per_step`. 1: this process only, without Ray."""

    cpus_per_worker: float = Field(default=1.0, gt=0)
    """CPU cores that Ray reserves for each worker; on CPU, also its number of threads."""

    gpus_per_worker: float | None = Field(default=None, ge=0)
    """GPUs that Ray reserves for each worker, a whole number. None: 1 if the cluster has GPUs, else 0."""

    max_failures: int = Field(default=3, ge=0)
    """How many times all workers restart from the newest checkpoint after losing one: its process or node died, or a step
    exceeded `step_timeout`."""

    step_timeout: float = Field(default=1800.0, gt=0)
    """Seconds without a completed collective after which workers are considered hung. A step, an evaluation, and copying a
    checkpoint must each take less."""

    @field_validator("gpus_per_worker")
    @classmethod
    def _gpus_are_whole(cls, gpus: float | None) -> float | None:
        if gpus is not None and gpus != int(gpus):
            raise ValueError(
                f"{gpus:g} is a part of a GPU, but workers cannot share one: each has its own vLLM and policy on it, and NCCL "
                "refuses two on one device: use 1"
            )
        return gpus
