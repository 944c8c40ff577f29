"""One adapter for the complete batch: two dense products instead of a gather per token.

vLLM's LoRA kernels serve many adapters. A policy has one, so `y += (x a^T) b^T` for all rows gives the same result. On
CPU, where vLLM copies A and B once per token, this is as fast as the base model.

On the LM head vLLM's kernels (0.32) are also wrong for the log-probabilities of prompts: they apply the adapters of the
requests that are sampled in the same step. So the head is always dense.

`wrapper_name(device_type, ...)` is the class that `vllm_compat.lora_wrapper_replaced` installs.

Shapes: T tokens of the engine's step, N rows of logits, D the hidden size, V the vocabulary, P the vocabulary as padded by
vLLM, R the buffers' rank (`max_lora_rank`). `lora_a_stacked[i]` is [1, 1, R, d_in], `lora_b_stacked[i]` is
[1, 1, d_out_i, R], one i per packed part (q, k, v; gate, up). The embedding's rows of A are gathered by vLLM.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch

from .slots import HEAD

if TYPE_CHECKING:
    from vllm.lora.layers import LoRAMapping


def is_dense(lora_path: Literal["auto", "dense", "punica"], *, on_cpu: bool, dtype: str) -> bool:
    """Whether the engine computes the adapter with dense products.

    Args:
        lora_path: `rollout.lora_path`.
        dtype: `model.dtype`.

    Raises:
        ValueError: vLLM's kernels are asked for, and do not compute in this dtype.
    """
    needs_dense = not on_cpu and dtype == "float32"  # vLLM's kernels on CUDA assert 16 bits
    if needs_dense and lora_path == "punica":
        raise ValueError(
            "rollout.lora_path: punica computes in 16 bits on CUDA, and model.dtype is float32: use auto or dense, or another "
            "dtype"
        )
    return lora_path == "dense" or (lora_path == "auto" and (on_cpu or needs_dense))


def wrapper_name(device_type: str, *, dense: bool, head: bool) -> str | None:
    """The import path of the wrapper class for `cpu` or `cuda`; None for vLLM's class.

    Args:
        dense: use dense products for every layer; otherwise for the LM head only.
        head: whether the LM head has an adapter.

    Raises:
        ValueError: any other device.
    """
    if not (dense or head):
        return None
    classes = {("cpu", True): "DensePunicaWrapperCPU", ("cuda", True): "DensePunicaWrapperGPU"}
    classes |= {("cpu", False): "DenseHeadPunicaWrapperCPU", ("cuda", False): "DenseHeadPunicaWrapperGPU"}
    if (device_type, dense) not in classes:
        remedy = "set rollout.lora_path: punica" if dense else f"remove {HEAD} from lora.targets"
        raise ValueError(f"there is no dense LoRA path for device '{device_type}': {remedy}")
    return f"{__name__}.{classes[device_type, dense]}"


class DenseHead:
    """A dense `add_lora_logits`. A mix-in, to be listed before one of vLLM's Punica wrappers.

    Rows of requests without the adapter keep the base model's output: the adapter's contribution is masked to zero.
    """

    # Which rows of the step use the adapter: all, none, or some ("mixed"). Set by `update_metadata`.
    coverage: Literal["all", "none", "mixed"] = "mixed"

    if TYPE_CHECKING:
        token_lora_indices: torch.Tensor
        sampler_indices: torch.Tensor

    def update_metadata(
        self, mapping: LoRAMapping, lora_index_to_id: list[int | None], max_loras: int, vocab_size: int, **kwargs: Any
    ) -> None:
        """Record which rows use the adapter. `max_loras` includes the empty slot, as vLLM passes it."""
        assert max_loras == 2, "the dense path serves exactly one adapter (max_loras=1)"
        super().update_metadata(mapping, lora_index_to_id, max_loras, vocab_size, **kwargs)  # type: ignore[misc]
        adapters = set(mapping.index_mapping)  # 0: no adapter
        self.coverage = "all" if 0 not in adapters else "none" if len(adapters) == 1 else "mixed"

    def add_lora_logits(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: torch.Tensor,
        lora_b_stacked: torch.Tensor,
        scale: float,
        **kwargs: Any,
    ) -> None:
        """Add the adapter's contribution to the logits `y` [N, P] in place, from hidden states `x` [N, D]; padding stays."""
        assert scale == 1.0, "the scale is folded into B"
        # Logits are computed outside captured CUDA graphs, so branching in Python is safe.
        if self.coverage == "none":
            return
        x_ND, b_VR = x.view(-1, x.shape[-1]), lora_b_stacked[0, 0]
        h_NR = x_ND @ lora_a_stacked[0, 0].t()
        if self.coverage == "mixed":
            h_NR *= (self._adapter_of_rows(x_ND)[:, None] >= 0).to(h_NR.dtype)
        logits_NV = y.view(-1, y.shape[-1])[:, : b_VR.shape[0]]
        logits_NV.addmm_(h_NR.to(y.dtype), b_VR.t().to(y.dtype))

    def _adapter_of_rows(self, x_ND: torch.Tensor) -> torch.Tensor:
        """[N] on a mixed step: 0 where a row of hidden states belongs to a request with the adapter, else -1.

        vLLM computes logits of gathered rows for sampling (one a request), and of a slice of all the step's rows for a prompt's
        log-probabilities. The number of rows alone cannot distinguish the two.
        """
        gathered = x_ND.untyped_storage().nbytes() == x_ND.nbytes
        if gathered and len(x_ND) == len(self.sampler_indices):
            return self.sampler_indices
        first = int(x_ND.storage_offset()) // x_ND.shape[1]
        return self.token_lora_indices[first : first + len(x_ND)]


class DenseLoRA(DenseHead):
    """Adds dense versions of `add_lora_linear` and `add_lora_embedding`, masked in the same way."""

    # False on CUDA: a branch in Python would be frozen into a captured CUDA graph.
    _branch_on_coverage: bool = True

    def row_mask(self, rows: int) -> torch.Tensor:
        """[rows, 1]: which of the step's first rows use the adapter."""
        return self.token_lora_indices[:rows, None] >= 0

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
        """Add the adapter's contribution to `y` [T, sum(d_out)] in place, from `x` [T, d_in]."""
        assert scale == 1.0, "the scale is folded into B"
        if self._branch_on_coverage and self.coverage == "none":
            return
        x_TI = x.view(-1, x.shape[-1])
        y_TO = y.view(-1, y.shape[-1])
        start = 0
        for a, b, width in zip(lora_a_stacked, lora_b_stacked, output_slices, strict=True):
            h_TR = x_TI @ a[0, 0].t()
            if not (self._branch_on_coverage and self.coverage == "all"):
                h_TR *= self.row_mask(len(h_TR)).to(h_TR.dtype)
            y_TO[:, start : start + width].addmm_(h_TR, b[0, 0].t(), beta=1.0 if add_inputs else 0.0)
            start += width

    def add_lora_embedding(
        self, y: torch.Tensor, x: torch.Tensor, lora_b_stacked: torch.Tensor, add_inputs: bool = True, **kwargs: Any
    ) -> None:
        """Add the adapter's contribution to the embeddings `y` [T, D] in place, from `x` [T, R], each token's row of A.

        vLLM gathers these rows for all tokens, also those of requests without the adapter. With one adapter the offset that it
        adds to token ids is 0.
        """
        if self._branch_on_coverage and self.coverage == "none":
            return
        if not (self._branch_on_coverage and self.coverage == "all"):
            x = x * self.row_mask(len(x)).to(x.dtype)
        y.addmm_(x, lora_b_stacked[0, 0].t(), beta=1.0 if add_inputs else 0.0)


def __getattr__(name: str) -> type:
    """Create the wrapper classes on first use: their bases are vLLM's, and this module must be importable without vLLM."""
    if name in ("DensePunicaWrapperCPU", "DenseHeadPunicaWrapperCPU"):
        from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU as VllmWrapper
    elif name in ("DensePunicaWrapperGPU", "DenseHeadPunicaWrapperGPU"):
        from vllm.lora.punica_wrapper.punica_gpu import PunicaWrapperGPU as VllmWrapper
    else:
        raise AttributeError(name)
    dense = DenseHead if name.startswith("DenseHead") else DenseLoRA
    cls = type(name, (dense, VllmWrapper), {"_branch_on_coverage": not name.endswith("GPU")})
    globals()[name] = cls
    return cls
