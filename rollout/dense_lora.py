"""One adapter for the whole batch: two dense products instead of a gather per token.

vLLM's LoRA kernels serve many adapters at once. A policy has one, so `y += (x a^T) b^T` for all rows is the same
mathematics; on CPU, where vLLM's fall-back copies A and B once per token, it runs at the speed of the base model.

`dense_wrapper_name(device_type)` gives the class that `vllm_compat.lora_wrapper_replaced` hands to vLLM.

Shapes: T tokens of the engine's step, R the buffers' rank (`max_lora_rank`), `lora_a_stacked[i]` is [1, 1, R, d_in],
`lora_b_stacked[i]` is [1, 1, d_out_i, R], one i per packed part (q, k, v; gate, up).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from vllm.lora.layers import LoRAMapping


def dense_wrapper_name(device_type: str) -> str:
    """The import path of the dense wrapper for `cpu` or `cuda`.

    Raises:
        ValueError: any other device.
    """
    classes = {"cpu": "DensePunicaWrapperCPU", "cuda": "DensePunicaWrapperGPU"}
    if device_type not in classes:
        raise ValueError(f"there is no dense LoRA path for device '{device_type}': set rollout.lora_path: punica")
    return f"{__name__}.{classes[device_type]}"


class DenseLoRA:
    """The dense `add_lora_linear`, to be mixed in ahead of one of vLLM's Punica wrappers.

    Rows that carry no adapter (a request without LoRA) keep the base model's output: their part is masked to zero.
    """

    # What the step's rows carry, told by `update_metadata`: every row the adapter, no row, or some rows ("mixed").
    _coverage: str = "mixed"
    # The branch on coverage is taken in Python, so it would be frozen into a captured CUDA graph.
    _branch_on_coverage: bool = True

    if TYPE_CHECKING:
        token_lora_indices: torch.Tensor

    def update_metadata(
        self, mapping: LoRAMapping, lora_index_to_id: list[int | None], max_loras: int, vocab_size: int, **kwargs: Any
    ) -> None:
        """Note which rows carry the adapter; max_loras counts the empty slot too, as vLLM passes it."""
        assert max_loras == 2, "the dense path serves exactly one adapter (max_loras=1)"
        super().update_metadata(mapping, lora_index_to_id, max_loras, vocab_size, **kwargs)  # type: ignore[misc]
        carriers = set(mapping.index_mapping)
        if 0 in carriers:
            self._coverage = "none" if len(carriers) == 1 else "mixed"
        else:
            self._coverage = "all"

    def add_lora_linear(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: tuple[torch.Tensor, ...],
        lora_b_stacked: tuple[torch.Tensor, ...],
        scale: float,
        output_slices: tuple[int, ...],
        *,
        add_inputs: bool = True,
        **kwargs: Any,
    ) -> None:
        """Add the adapter's part to `y` [T, sum(d_out)] in place, from `x` [T, d_in]."""
        assert scale == 1.0, "the scale is folded into B"
        if self._branch_on_coverage and self._coverage == "none":
            return
        x_TI = x.view(-1, x.shape[-1])
        y_TO = y.view(-1, y.shape[-1])
        start = 0
        for a, b, width in zip(lora_a_stacked, lora_b_stacked, output_slices, strict=True):
            h_TR = x_TI @ a[0, 0].t()
            if not (self._branch_on_coverage and self._coverage == "all"):
                h_TR *= (self.token_lora_indices[: h_TR.shape[0], None] >= 0).to(h_TR.dtype)
            y_TO[:, start : start + width].addmm_(h_TR, b[0, 0].t(), beta=1.0 if add_inputs else 0.0)
            start += width


def __getattr__(name: str) -> type:
    """Make the wrapper classes on first use: their bases come from vLLM, and importing this module must not need it."""
    if name == "DensePunicaWrapperCPU":
        from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

        cls = type(name, (DenseLoRA, PunicaWrapperCPU), {})
    elif name == "DensePunicaWrapperGPU":
        from vllm.lora.punica_wrapper.punica_gpu import PunicaWrapperGPU

        cls = type(name, (DenseLoRA, PunicaWrapperGPU), {"_branch_on_coverage": False})
    else:
        raise AttributeError(name)
    globals()[name] = cls
    return cls
