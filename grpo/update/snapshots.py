"""Copies of the fp32 master weights and the optimizer's state on the host, to roll back to.

    snapshots = Snapshots(policy.masters, optimizer)
    snapshots.take("step", step)            # between the backward pass and the update
    step = snapshots.restore("step")        # writes into the same tensors; publish them to the sampler afterwards

A copy is bit-exact: after a restore, the same gradients give the same parameters. Memory is allocated by the first `take` of a
kind (12 bytes a parameter with AdamW, 6 with its 8-bit variants), page-locked if the parameters are on a GPU, and reused. All
tensors are parts of a few large buffers: the copies of a snapshot are queued together and waited for once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch

from ..common.errors import first_line
from ..common.log import logger
from ..guards.decision import SnapshotKind
from .optimizer import is_state_of, optimizer_tensors, set_optimizer_tensors

SLAB_BYTES = 2**28  # torch rounds page-locked memory up to a power of two
ALIGNMENT = 64
STEP = "step"
MASTER = ".master"
"""In `state_dict`: the name of the step, and the suffix of a parameter's name. Names begin with the parameter's index."""


class Snapshots:
    """One snapshot of each kind. The guards decide when to take and restore them (`guards.decision.SnapshotStore`)."""

    def __init__(self, parameters: Iterable[torch.Tensor], optimizer: torch.optim.Optimizer) -> None:
        parameters = list(parameters)
        self.by_kind: dict[SnapshotKind, Snapshot] = {
            "step": Snapshot(parameters, optimizer),
            "evaluation": Snapshot(parameters, optimizer),
        }

    def take(self, kind: SnapshotKind, step: int) -> None:
        """Replace the snapshot of that kind by the current state, after `step` updates."""
        self.by_kind[kind].take(step)

    def restore(self, kind: SnapshotKind) -> int:
        """Write the snapshot back into parameters and optimizer; returns its step."""
        return self.by_kind[kind].restore()


class Snapshot:
    """One snapshot of parameters and optimizer, replaced by each `take`. See the module's docstring.

    Args:
        parameters: the fp32 master weights; always the same tensors.
        optimizer: of these parameters, from `make_optimizer`.
    """

    def __init__(self, parameters: Iterable[torch.Tensor], optimizer: torch.optim.Optimizer) -> None:
        self.step: int | None = None
        """Updates done when it was taken; None before the first `take`."""
        self._parameters = list(parameters)
        self._optimizer = optimizer
        self._host: dict[str, torch.Tensor] = {}
        self._is_page_locked = self._parameters[0].is_cuda
        self._names: list[str] = []  # of the snapshot; `_host` may hold further buffers

    def take(self, step: int) -> None:
        """Copy parameters and optimizer state to the host, replacing the previous snapshot."""
        self._copy_to_host(self._live())
        self.step = step

    @torch.no_grad()
    def restore(self) -> int:
        """Write the snapshot back into the same tensors and return its step.

        Optimizer state that did not exist then (AdamW has none before its first update) becomes zero, its initial value.
        """
        assert self.step is not None, "restore needs a snapshot"
        saved = {name: self._host[name] for name in self._names}
        for index, parameter in enumerate(self._parameters):
            parameter.copy_(saved.pop(f"{index}{MASTER}"), non_blocking=True)
        set_optimizer_tensors(self._optimizer, self._parameters, saved)
        self._synchronize()
        return self.step

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The snapshot's tensors by name, on the host, not copied; `step` [] int64. Empty before the first `take`."""
        if self.step is None:
            return {}
        return {STEP: torch.tensor(self.step), **{name: self._host[name] for name in self._names}}

    def load_state_dict(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Copy what `state_dict` returned into the snapshot; parameters and optimizer do not change.

        The state of another kind of optimizer is dropped: a restore then resets the optimizer's state.

        Raises:
            ValueError: the snapshot belongs to other parameters.
        """
        masters = {name: tensor for name, tensor in tensors.items() if name.endswith(MASTER)}
        state = {name: tensor for name, tensor in tensors.items() if name not in masters and name != STEP}
        expected = {f"{index}{MASTER}": parameter.shape for index, parameter in enumerate(self._parameters)}
        if tensors and expected != {name: tensor.shape for name, tensor in masters.items()}:
            raise ValueError("the snapshot belongs to another adapter: resume with the configuration that it was made with")
        self.step = int(tensors[STEP]) if tensors else None
        self._copy_to_host(masters | (state if is_state_of(self._optimizer, state) else {}))

    def _live(self) -> dict[str, torch.Tensor]:
        """The current parameters and optimizer state, by name."""
        masters = {f"{index}{MASTER}": parameter.detach() for index, parameter in enumerate(self._parameters)}
        return masters | optimizer_tensors(self._optimizer, self._parameters)

    def _copy_to_host(self, tensors: Mapping[str, torch.Tensor]) -> None:
        missing = {name: tensor for name, tensor in tensors.items() if name not in self._host}
        self._host |= _host_tensors(missing, self._host_memory)
        self._names = list(tensors)
        for name, tensor in tensors.items():
            self._host[name].copy_(tensor, non_blocking=True)
        self._synchronize()

    def _synchronize(self) -> None:
        """Wait for the copies."""
        if self._parameters[0].is_cuda:
            torch.cuda.current_stream(self._parameters[0].device).synchronize()

    def _host_memory(self, size: int) -> torch.Tensor:
        """So many bytes, page-locked if the parameters are on a GPU: they are several times faster to copy then.

        Where the system grants no such memory (WSL2 grants little, containers by `ulimit -l`), it is ordinary memory.
        """
        if self._is_page_locked:
            try:
                return torch.empty(size, dtype=torch.uint8, pin_memory=True)
            except RuntimeError as error:
                self._is_page_locked = False
                logger.info(f"snapshots are in ordinary memory, slower to copy: no page-locked memory ({first_line(error)})")
        return torch.empty(size, dtype=torch.uint8)


def _host_tensors(
    tensors: Mapping[str, torch.Tensor], memory: Callable[[int], torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Tensors of the same shapes and dtypes on the host, next to each other in buffers of at most `SLAB_BYTES`, or one each."""
    slabs: list[dict[str, int]] = []
    used = SLAB_BYTES
    for name, tensor in tensors.items():
        size = -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
        if used + size > SLAB_BYTES:
            slabs.append({})
            used = 0
        slabs[-1][name] = size
        used += size
    found = {}
    for sizes in slabs:
        flat = memory(sum(sizes.values()))
        for (name, _), part in zip(sizes.items(), flat.split(list(sizes.values())), strict=True):
            like = tensors[name]
            found[name] = part[: like.nbytes].view(like.dtype).view(like.shape)
    return found
