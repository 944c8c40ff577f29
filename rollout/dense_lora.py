"""One adapter for the whole batch: two dense products instead of a gather per token.

vLLM's LoRA kernels serve many adapters at once. A policy has one, so `y += (x a^T) b^T` for all rows is the same
mathematics; on CPU, where vLLM's fall-back copies A and B once per token, it runs at the speed of the base model.

On the LM head vLLM's own kernels (0.32) are also wrong for a prompt's log-probabilities: they give its rows the adapters of
the requests that are sampled in the same step. So the head is dense on every path.

`wrapper_name(device_type, ...)` gives the class that `vllm_compat.lora_wrapper_replaced` hands to vLLM.

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


def wrapper_name(device_type: str, *, dense: bool, head: bool) -> str | None:
    """The import path of the wrapper class for `cpu` or `cuda`, None for vLLM's own.

    `dense`: every layer by plain products; without it only the LM head, if `head` says that it has an adapter.

    Raises:
        ValueError: any other device.
    """
    if not (dense or head):
        return None
    classes = {("cpu", True): "DensePunicaWrapperCPU", ("cuda", True): "DensePunicaWrapperGPU"}
    classes |= {("cpu", False): "DenseHeadPunicaWrapperCPU", ("cuda", False): "DenseHeadPunicaWrapperGPU"}
    if (device_type, dense) not in classes:
        remedy = "set rollout.lora_path: punica" if dense else f"take {HEAD} out of lora.targets"
        raise ValueError(f"there is no dense LoRA path for device '{device_type}': {remedy}")
    return f"{__name__}.{classes[device_type, dense]}"


class DenseHead:
    """The dense `add_lora_logits`, to be mixed in ahead of one of vLLM's Punica wrappers.

    Rows that carry no adapter (a request without LoRA) keep the base model's output: their part is masked to zero.
    """

    # What the step's rows carry, told by `update_metadata`: every row the adapter, no row, or some rows ("mixed").
    coverage: Literal["all", "none", "mixed"] = "mixed"

    if TYPE_CHECKING:
        token_lora_indices: torch.Tensor
        sampler_indices: torch.Tensor

    def update_metadata(
        self, mapping: LoRAMapping, lora_index_to_id: list[int | None], max_loras: int, vocab_size: int, **kwargs: Any
    ) -> None:
        """Note which rows carry the adapter; max_loras counts the empty slot too, as vLLM passes it."""
        assert max_loras == 2, "the dense path serves exactly one adapter (max_loras=1)"
        super().update_metadata(mapping, lora_index_to_id, max_loras, vocab_size, **kwargs)  # type: ignore[misc]
        carriers = set(mapping.index_mapping)
        if 0 in carriers:
            self.coverage = "none" if len(carriers) == 1 else "mixed"
        else:
            self.coverage = "all"

    def add_lora_logits(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: torch.Tensor,
        lora_b_stacked: torch.Tensor,
        scale: float,
        **kwargs: Any,
    ) -> None:
        """Add the adapter's part to the logits `y` [N, P] in place, from hidden states `x` [N, D]; the padding stays."""
        assert scale == 1.0, "the scale is folded into B"
        # Logits are made outside of captured CUDA graphs, so a branch in Python holds for this step alone.
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

        vLLM asks for logits of rows that it gathered for sampling, one a request, and for a prompt's log-probabilities of a
        slice of all the step's rows. Their number alone does not tell them apart.
        """
        gathered = x_ND.untyped_storage().nbytes() == x_ND.nbytes
        if gathered and len(x_ND) == len(self.sampler_indices):
            return self.sampler_indices
        first = int(x_ND.storage_offset()) // x_ND.shape[1]
        return self.token_lora_indices[first : first + len(x_ND)]


class DenseLoRA(DenseHead):
    """The dense `add_lora_linear` and `add_lora_embedding` besides, masked likewise."""

    # The branch on coverage is taken in Python, so it would be frozen into a captured CUDA graph.
    _branch_on_coverage: bool = True

    def row_mask(self, rows: int) -> torch.Tensor:
        """[rows, 1]: which of the step's rows carry the adapter."""
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
        """Add the adapter's part to `y` [T, sum(d_out)] in place, from `x` [T, d_in]."""
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
        """Add the adapter's part to the embeddings `y` [T, D] in place, from `x` [T, R], the row of A of each token.

        vLLM gathers these rows for all tokens, those of requests without the adapter too (there is one adapter, so the
        offset that it adds to the token ids is 0).
        """
        if self._branch_on_coverage and self.coverage == "none":
            return
        if not (self._branch_on_coverage and self.coverage == "all"):
            x = x * self.row_mask(len(x)).to(x.dtype)
        y.addmm_(x, lora_b_stacked[0, 0].t(), beta=1.0 if add_inputs else 0.0)


def __getattr__(name: str) -> type:
    """Make the wrapper classes on first use: their bases come from vLLM, and importing this module must not need it."""
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
