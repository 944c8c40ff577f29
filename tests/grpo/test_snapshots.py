"""A snapshot holds every bit of masters and optimizer, goes back into the same tensors, and survives a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import torch

from rankup.grpo.snapshots import Snapshot

SHAPES = [(8, 16), (24, 8), (5,)]


@dataclass
class Run:
    """Masters, their optimizer, and a snapshot of both; step n always has the same gradients."""

    masters: list[torch.Tensor]
    optimizer: torch.optim.AdamW
    snapshot: Snapshot

    def steps(self, steps: Sequence[int]) -> None:
        for step in steps:
            generator = torch.Generator().manual_seed(step)
            for master in self.masters:
                master.grad = torch.randn(master.shape, generator=generator)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)

    def everything(self) -> list[torch.Tensor]:
        """Masters and optimizer state as they are: the tensors themselves."""
        return [*self.masters, *(v for m in self.masters for v in self.optimizer.state.get(m, {}).values())]

    def values(self) -> list[torch.Tensor]:
        return [tensor.detach().clone() for tensor in self.everything()]


@pytest.fixture
def make_run() -> Callable[[], Run]:
    def make() -> Run:
        generator = torch.Generator().manual_seed(0)
        masters = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]
        optimizer = torch.optim.AdamW(masters, lr=0.01, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
        return Run(list(masters), optimizer, Snapshot(masters, optimizer))

    return make


@pytest.fixture
def run(make_run: Callable[[], Run]) -> Run:
    return make_run()


def equal(left: Sequence[torch.Tensor], right: Sequence[torch.Tensor]) -> bool:
    return len(left) == len(right) and all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize("taken_after", [0, 3])  # before its first step an optimizer has no state
def test_the_same_steps_after_a_restore_give_the_same_bits(run: Run, taken_after: int):
    run.steps(range(taken_after))
    before = run.values()
    run.snapshot.take(taken_after)
    run.steps(range(3, 7))
    after = run.values()
    assert not equal(run.masters, before[: len(SHAPES)])
    assert run.snapshot.restore() == taken_after
    assert equal(run.everything(), before)
    run.steps(range(3, 7))
    assert equal(run.everything(), after)


def test_masters_and_state_stay_the_same_tensors(run: Run):
    run.steps(range(2))
    run.snapshot.take(2)
    tensors, addresses = run.everything(), [tensor.data_ptr() for tensor in run.everything()]
    run.steps(range(2, 4))
    run.snapshot.restore()
    assert all(now is then for now, then in zip(run.everything(), tensors, strict=True))
    assert [tensor.data_ptr() for tensor in run.everything()] == addresses


def test_a_later_snapshot_replaces_the_one_before_and_can_be_restored_twice(run: Run):
    run.snapshot.take(0)
    run.steps(range(2))
    run.snapshot.take(2)
    expected = run.values()
    for _ in range(2):
        run.steps(range(2, 5))
        assert run.snapshot.restore() == 2
        assert equal(run.everything(), expected)


def test_buffers_are_made_once(run: Run):
    run.steps(range(1))
    run.snapshot.take(1)
    addresses = {name: tensor.data_ptr() for name, tensor in run.snapshot.state_dict().items() if name != "step"}
    run.steps(range(1, 3))
    run.snapshot.take(3)
    assert {n: tensor.data_ptr() for n, tensor in run.snapshot.state_dict().items() if n != "step"} == addresses
    assert set(addresses.values()).isdisjoint(tensor.data_ptr() for tensor in run.everything())


def test_a_master_without_gradient_has_no_state_before_and_after(run: Run):
    first = run.masters[0]
    first.grad = torch.ones_like(first)
    run.optimizer.step()
    run.snapshot.take(1)
    run.steps(range(1, 3))
    run.snapshot.restore()
    assert set(run.optimizer.state) == {first}
    assert run.optimizer.state[first]["step"] == 1


@pytest.mark.parametrize("taken_after", [0, 3])
def test_a_snapshot_survives_a_checkpoint(make_run: Callable[[], Run], taken_after: int):
    old, new = make_run(), make_run()
    old.steps(range(taken_after))
    old.snapshot.take(taken_after)
    expected = old.values()
    saved = {name: tensor.clone() for name, tensor in old.snapshot.state_dict().items()}
    new.steps(range(5))
    now = new.values()
    new.snapshot.load_state_dict(saved)
    assert equal(new.everything(), now)
    assert new.snapshot.restore() == taken_after
    assert equal(new.everything(), expected)


def test_no_snapshot_survives_a_checkpoint_too(make_run: Callable[[], Run]):
    old, new = make_run(), make_run()
    new.snapshot.take(0)
    new.snapshot.load_state_dict(old.snapshot.state_dict())
    assert old.snapshot.state_dict() == {}
    assert new.snapshot.step is None


def test_a_snapshot_of_another_adapter_is_refused(run: Run):
    other = torch.nn.Parameter(torch.zeros(3))
    snapshot = Snapshot([other], torch.optim.AdamW([other]))
    snapshot.take(0)
    with pytest.raises(ValueError, match="of another adapter"):
        run.snapshot.load_state_dict(snapshot.state_dict())


def test_restoring_nothing_is_our_mistake(run: Run):
    with pytest.raises(AssertionError, match="needs a snapshot"):
        run.snapshot.restore()
