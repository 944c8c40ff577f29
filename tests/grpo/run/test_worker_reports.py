"""What workers say of a step: that all hold one policy, and what the metrics make of their times."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from rankup.grpo.run.worker_reports import DivergedError, WorkerReport, check_same_policy, checksum, slowest, time_metrics

TIMES = {"rollout": 2.0, "train": 1.0}
REPORT = WorkerReport(seconds=TIMES, sampled_tokens=100, seen_tokens=150, policy_version=7, checksum=255)
SLOWER = dataclasses.replace(REPORT, seconds={"rollout": 4.0, "train": 0.5}, sampled_tokens=80)


def masters() -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(5, 3), torch.randn(4)]


@pytest.mark.parametrize("bit", [0, 12, 23, 31])
@pytest.mark.parametrize(("tensor", "place"), [(0, 0), (0, 14), (1, 3)])
def test_every_bit_counts(bit: int, tensor: int, place: int):
    changed = masters()
    changed[tensor].view(torch.int32).view(-1)[place] ^= torch.tensor(1 << bit).to(torch.int32)
    assert checksum(changed) != checksum(masters())


def test_a_number_in_another_tensor_is_another_policy():
    first, second = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])
    assert checksum([first, second]) != checksum([second, first])


def test_two_policies_are_reported_with_versions_and_checksums():
    check_same_policy([REPORT, SLOWER])
    for change, words in (
        ({"checksum": 16}, "worker 1 .* version 7, adapter 0000000000000010, instead of version 7, adapter 00000000000000ff"),
        ({"policy_version": 8}, "worker 1 .* version 8, adapter 00000000000000ff, instead of version 7"),
    ):
        with pytest.raises(DivergedError, match=words):
            check_same_policy([REPORT, dataclasses.replace(REPORT, **change)])


def test_a_step_takes_as_long_as_its_slowest_worker():
    assert slowest([REPORT, SLOWER]) == {"rollout": 4.0, "train": 1.0}
    metrics = time_metrics([REPORT, SLOWER], trained_tokens=50)
    assert metrics["tokens_per_second/rollout"] == 180 / 4
    assert metrics["tokens_per_second/train"] == 50
    assert (metrics["workers/0/tokens_per_second"], metrics["workers/1/tokens_per_second"]) == (50, 20)


def test_one_worker_is_not_named():
    assert not any(name.startswith("workers/") for name in time_metrics([REPORT], trained_tokens=50))
