"""A copy of the adapter's masters and of the optimizer's state on the host, to go back to.

    snapshot = Snapshot(policy.masters, optimizer)
    snapshot.take(step)              # between the backward pass and the update
    step = snapshot.restore()        # the same tensors with the values of then; publish them to the sampler afterwards

A copy is exact to the bit: after a restore, the same gradients give the same parameters. Memory is allocated at the first
`take` (12 bytes a parameter with AdamW, 6 with its 8-bit kinds), page-locked if the parameters are on a GPU, and used again
by the next.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from .optimizer import is_state_of, optimizer_tensors, set_optimizer_tensors

STEP = "step"
MASTER = ".master"
"""Name of the step in `state_dict`, and how a parameter's name ends; it and its state's begin with the parameter's index."""


class Snapshot:
    """One snapshot of parameters and optimizer, replaced by each `take`. See the module's docstring.

    Args:
        parameters: the masters, of any shape and dtype; always the same tensors.
        optimizer: theirs, of `make_optimizer`.
    """

    def __init__(self, parameters: Iterable[torch.Tensor], optimizer: torch.optim.Optimizer) -> None:
        self.step: int | None = None
        """Step of the snapshot; None before the first."""
        self._parameters = list(parameters)
        self._optimizer = optimizer
        self._host: dict[str, torch.Tensor] = {}
        self._names: list[str] = []  # of the snapshot; buffers of state that it lacks stay in `_host`

    def take(self, step: int) -> None:
        """Copy everything to the host, in place of the snapshot before."""
        self._copy_to_host(self._live())
        self.step = step

    @torch.no_grad()
    def restore(self) -> int:
        """Write the snapshot back into the same tensors and return its step.

        State that the optimizer did not have then (before its first update AdamW has none) becomes zero, as it begins.
        """
        assert self.step is not None, "restore needs a snapshot"
        saved = {name: self._host[name] for name in self._names}
        for index, parameter in enumerate(self._parameters):
            parameter.copy_(saved.pop(f"{index}{MASTER}"))
        set_optimizer_tensors(self._optimizer, self._parameters, saved)
        return self.step

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The snapshot's tensors by name, on the host, not copied; `step` [] int64. Empty before the first `take`."""
        if self.step is None:
            return {}
        return {STEP: torch.tensor(self.step), **{name: self._host[name] for name in self._names}}

    def load_state_dict(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Take over what `state_dict` returned, by copy; parameters and optimizer stay as they are.

        The state of another kind of optimizer is left out: a restore then begins it anew.

        Raises:
            ValueError: the snapshot is of other parameters.
        """
        masters = {name: tensor for name, tensor in tensors.items() if name.endswith(MASTER)}
        state = {name: tensor for name, tensor in tensors.items() if name not in masters and name != STEP}
        own = {f"{index}{MASTER}": parameter.shape for index, parameter in enumerate(self._parameters)}
        if tensors and own != {name: tensor.shape for name, tensor in masters.items()}:
            raise ValueError("the snapshot is of another adapter; resume with the configuration that it was made with")
        self.step = int(tensors[STEP]) if tensors else None
        self._copy_to_host(masters | (state if is_state_of(self._optimizer, state) else {}))

    def _live(self) -> dict[str, torch.Tensor]:
        """Parameters and state as they are now, by name."""
        masters = {f"{index}{MASTER}": parameter.detach() for index, parameter in enumerate(self._parameters)}
        return masters | optimizer_tensors(self._optimizer, self._parameters)

    def _copy_to_host(self, tensors: Mapping[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            if name not in self._host:
                # Page-locked memory is several times faster to copy to and from a GPU.
                self._host[name] = torch.empty_like(tensor, device="cpu", pin_memory=self._parameters[0].is_cuda)
        self._names = list(tensors)
        if tensors:  # torch refuses empty lists
            torch._foreach_copy_([self._host[name] for name in tensors], list(tensors.values()))  # type: ignore[attr-defined]
