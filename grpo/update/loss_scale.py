"""The loss scale of float16 (arXiv 1710.03740): the backward pass computes the gradient of `scale * loss`.

    scale = LossScale(config.optim.initial_loss_scale)
    policy.backward(pack, token_loss, loss_scale=scale.value)
    scale.unscale_(policy.masters)              # the gradients of the fp32 master weights are those of the loss again
    if overflowed and scale.halve(initial):     # repeat the backward pass
        ...
    metrics, notes = scale.metrics(), scale.end_step(step, is_finite=True)       # after the updates of a step

float16 has no number between 0 and 6e-8, and gradients of hidden states are often smaller, since a token's loss is divided by
the number of tokens. Scales are powers of two, so scaling itself rounds nothing. The rules are those of `torch.amp.GradScaler`,
except for an overflow: there the update is lost, here the backward pass is repeated, because sampling the batch took longer
than that.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

GROWTH_INTERVAL = 100
"""Steps without overflow after which the scale is doubled. An overflow costs one backward pass."""

MAX_SCALE = 2.0**24

OUT_OF_RANGE = (
    "activations or gradients leave float16's range (65504) at any loss scale: if that recurs, set model.dtype=bfloat16, or "
    "float32 on a GPU without it"
)


class LossScale:
    """See the module's docstring.

    Attributes:
        value: the scale, a power of two of at least 1.
        overflows: backward passes of the current step that were repeated.
    """

    def __init__(self, initial: float) -> None:
        self.value = initial
        self.overflows = 0
        self._lowest = initial
        self._steps_without_overflow = 0
        self._between_steps = self._state()

    @torch.no_grad()
    def unscale_(self, parameters: Iterable[torch.Tensor]) -> None:
        """Divide the gradients by the scale."""
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        if gradients:  # torch refuses empty lists
            torch._foreach_mul_(gradients, 1.0 / self.value)  # type: ignore[attr-defined]

    def halve(self, initial: float) -> bool:
        """Halve the scale after an overflow. If it is 1 already, the scale is not to blame: returns False, and sets it back to
        `initial`, its value before the first of these overflows."""
        self._steps_without_overflow = 0
        if self.value == 1.0:
            self.value = initial
            return False
        self.value /= 2
        self.overflows += 1
        return True

    def metrics(self) -> dict[str, float]:
        """The scale, and how many backward passes of the step were repeated."""
        return {"loss_scale": self.value, "loss_scale/overflows": float(self.overflows)}

    def end_step(self, step: int, *, is_finite: bool) -> tuple[str, ...]:
        """Count a step, and double the scale if enough of them had no overflow. Returns notes for the user.

        A note tells of a scale that is lower than ever before. After a doubling one overflow is expected, and not worth a note.
        `is_finite`: whether the step's gradient was in the end.
        """
        notes: tuple[str, ...] = ()
        if not is_finite:
            notes = (f"step {step + 1}: {OUT_OF_RANGE}",)
        elif self.value < self._lowest:
            self._lowest = self.value
            times = "once" if self.overflows == 1 else f"{self.overflows} times"
            notes = (f"step {step + 1}: the backward pass overflowed float16 {times}: the loss scale is {self.value:g} now",)
        self._steps_without_overflow += not self.overflows
        if self._steps_without_overflow == GROWTH_INTERVAL:
            self.value = min(2.0 * self.value, MAX_SCALE)
            self._steps_without_overflow = 0
        self.overflows = 0
        self._between_steps = self._state()
        return notes

    def state_dict(self) -> dict[str, float]:
        """Everything that later steps depend on, as plain data. In the middle of a step: the state before it."""
        return dict(self._between_steps)

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Restore the state of `state_dict`."""
        self.value, self._lowest = state["value"], state["lowest"]
        self._steps_without_overflow = int(state["steps_without_overflow"])
        self.overflows = 0
        self._between_steps = self._state()

    def _state(self) -> dict[str, float]:
        return {"value": self.value, "lowest": self._lowest, "steps_without_overflow": float(self._steps_without_overflow)}
