"""A snapshot holds every bit of master weights and optimizer, goes back into the same tensors, and survives a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from safetensors.torch import load, save

from rankup.grpo.config import OptimConfig
from rankup.grpo.model.lora_layers import Master, Role
from rankup.grpo.update.optimizer import make_optimizer, optimizer_tensors
from rankup.grpo.update.snapshots import Snapshot

SHAPES: list[tuple[Role, tuple[int, ...]]] = [("a", (8, 16)), ("b", (30, 150)), ("b", (5,)), ("embedding", (4, 1100))]
"""With state of 8 bits the second has some, in blocks of 256 entries the last of which is not full."""

MakeRun = Callable[[], "Run"]


@dataclass
class Run:
    """Master weights, their optimizer, and a snapshot of both; step n always has the same gradients."""

    masters: list[torch.Tensor]
    optimizer: torch.optim.Optimizer
    snapshot: Snapshot

    def steps(self, steps: Sequence[int]) -> None:
        for step in steps:
            generator = torch.Generator().manual_seed(step)
            for master in self.masters:
                master.grad = torch.randn(master.shape, generator=generator)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)

    def tensors(self) -> list[torch.Tensor]:
        """Master weights and optimizer state: the tensors themselves."""
        state = [value for master in self.masters for value in self.optimizer.state.get(master, {}).values()]
        return [*self.masters, *(value for value in state if isinstance(value, torch.Tensor))]

    def values(self) -> dict[str, torch.Tensor]:
        """Copies of master weights and optimizer state."""
        masters = {str(index): master for index, master in enumerate(self.masters)}
        now = masters | optimizer_tensors(self.optimizer, self.masters)
        return {name: tensor.detach().clone() for name, tensor in now.items()}

    def is_at(self, then: dict[str, torch.Tensor]) -> bool:
        """Whether all values are those, and state that there was not is zero."""
        now = self.values()
        same = (torch.equal(now[name], then[name]) if name in then else not now[name].any() for name in now)
        return then.keys() <= now.keys() and all(same)


def run_with(optimizer_name: Any) -> Run:
    generator = torch.Generator().manual_seed(0)
    masters = [
        Master(torch.nn.Parameter(torch.randn(shape, generator=generator)), role, scaling=1.0, rank=8)
        for role, shape in SHAPES
    ]
    optimizer = make_optimizer(masters, OptimConfig(optimizer=optimizer_name, learning_rate=0.01))
    parameters = [master.parameter for master in masters]
    return Run(list(parameters), optimizer, Snapshot(parameters, optimizer))


@pytest.fixture(params=["adamw", "adamw_8bit"])
def make_run(request: pytest.FixtureRequest) -> MakeRun:
    return lambda: run_with(request.param)


@pytest.fixture
def run(make_run: MakeRun) -> Run:
    return make_run()


@pytest.mark.parametrize("taken_after", [0, 3])  # before its first step AdamW has no state
def test_the_same_steps_after_a_restore_give_the_same_bits(run: Run, taken_after: int):
    run.steps(range(taken_after))
    before = run.values()
    run.snapshot.take(taken_after)
    run.steps(range(3, 7))
    after = run.values()
    assert not run.is_at(before)
    assert run.snapshot.restore() == taken_after
    assert run.is_at(before)
    run.steps(range(3, 7))
    assert run.is_at(after)


def test_masters_and_state_stay_the_same_tensors(run: Run):
    run.steps(range(2))
    run.snapshot.take(2)
    tensors, addresses = run.tensors(), [tensor.data_ptr() for tensor in run.tensors()]
    run.steps(range(2, 4))
    run.snapshot.restore()
    assert all(now is then for now, then in zip(run.tensors(), tensors, strict=True))
    assert [tensor.data_ptr() for tensor in run.tensors()] == addresses


def test_a_later_snapshot_replaces_the_one_before_and_can_be_restored_twice(run: Run):
    run.snapshot.take(0)
    run.steps(range(2))
    run.snapshot.take(2)
    expected = run.values()
    for _ in range(2):
        run.steps(range(2, 5))
        assert run.snapshot.restore() == 2
        assert run.is_at(expected)


def test_buffers_are_made_once(run: Run):
    run.steps(range(1))
    run.snapshot.take(1)
    addresses = {name: tensor.data_ptr() for name, tensor in run.snapshot.state_dict().items() if name != "step"}
    run.steps(range(1, 3))
    run.snapshot.take(3)
    assert {n: tensor.data_ptr() for n, tensor in run.snapshot.state_dict().items() if n != "step"} == addresses
    assert set(addresses.values()).isdisjoint(tensor.data_ptr() for tensor in run.tensors())


def test_a_master_without_gradient_begins_with_its_first_one(run: Run):
    first = run.masters[0]
    first.grad = torch.ones_like(first)
    run.optimizer.step()
    run.snapshot.take(1)
    run.steps(range(1, 3))
    expected = run.values()
    run.snapshot.restore()
    state = optimizer_tensors(run.optimizer, run.masters)
    assert state["0.step"] == 1 and state["1.step"] == 0
    run.steps(range(1, 3))
    assert run.is_at(expected)


@pytest.mark.parametrize("taken_after", [0, 3])
def test_a_snapshot_survives_a_checkpoint(make_run: MakeRun, taken_after: int):
    old, new = make_run(), make_run()
    old.steps(range(taken_after))
    old.snapshot.take(taken_after)
    expected = old.values()
    saved = load(save(old.snapshot.state_dict()))
    new.steps(range(5))
    now = new.values()
    new.snapshot.load_state_dict(saved)
    assert new.is_at(now)
    assert new.snapshot.restore() == taken_after
    assert new.is_at(expected)
    for run in (old, new):
        run.steps(range(3, 6))
    assert new.is_at(old.values())


def test_no_snapshot_survives_a_checkpoint_too(make_run: MakeRun):
    old, new = make_run(), make_run()
    new.snapshot.take(0)
    new.snapshot.load_state_dict(old.snapshot.state_dict())
    assert old.snapshot.state_dict() == {}
    assert new.snapshot.step is None


@pytest.mark.parametrize("names", [("adamw", "adamw_8bit"), ("adamw_8bit", "adamw")])
def test_a_snapshot_of_another_optimizer_has_its_masters_only(names: tuple[str, str]):
    old, new, fresh = run_with(names[0]), run_with(names[1]), run_with(names[1])
    old.steps(range(2))
    old.snapshot.take(2)
    new.steps(range(3))
    new.snapshot.load_state_dict(old.snapshot.state_dict())
    assert new.snapshot.restore() == 2
    assert all(map(torch.equal, new.masters, old.masters))
    with torch.no_grad():
        for one, other in zip(fresh.masters, old.masters, strict=True):
            one.copy_(other)
    for run in (new, fresh):
        run.steps(range(3, 6))
    assert new.is_at(fresh.values())


def test_a_snapshot_of_another_adapter_is_refused(run: Run):
    other = torch.nn.Parameter(torch.zeros(3))
    snapshot = Snapshot([other], torch.optim.AdamW([other]))
    snapshot.take(0)
    with pytest.raises(ValueError, match="belongs to another adapter"):
        run.snapshot.load_state_dict(snapshot.state_dict())


def test_restoring_nothing_is_our_mistake(run: Run):
    with pytest.raises(AssertionError, match="needs a snapshot"):
        run.snapshot.restore()


def test_without_page_locked_memory_snapshots_are_in_ordinary_memory(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As in WSL2. One note, not one for each tensor."""
    run = run_with("adamw")
    run.snapshot._is_page_locked = True  # as if the parameters were on a GPU
    empty = torch.empty

    def refused(*size: Any, pin_memory: bool = False, **options: Any) -> torch.Tensor:
        if pin_memory:
            raise RuntimeError("CUDA error: out of memory\nmore lines")
        return empty(*size, **options)

    monkeypatch.setattr(torch, "empty", refused)
    with caplog.at_level("INFO", logger="rankup"):
        run.steps([0])
        run.snapshot.take(1)
    then = run.values()
    run.steps([1])
    assert not run.is_at(then)
    assert run.snapshot.restore() == 1 and run.is_at(then)
    (note,) = caplog.messages
    assert note.endswith("no page-locked memory (CUDA error: out of memory)")
