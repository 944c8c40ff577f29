"""The section `cluster`."""

import pytest

from rankup.grpo.config import ClusterConfig


@pytest.mark.parametrize("gpus", [None, 0, 1, 1.0, 2])
def test_whole_gpus_are_accepted(gpus: float | None) -> None:
    assert ClusterConfig(gpus_per_worker=gpus).gpus_per_worker == gpus


@pytest.mark.parametrize("gpus", [0.5, 1.5])
def test_a_part_of_a_gpu_is_refused(gpus: float) -> None:
    with pytest.raises(ValueError, match=rf"{gpus} is a part of a GPU, but workers cannot share one.*: use 1"):
        ClusterConfig(gpus_per_worker=gpus)
