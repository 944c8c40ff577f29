"""The instrument of `memory.py`: how much memory tensors take that are never made, on a CUDA device that is not there.

    with fake_tensors() as memory, choices_of_cuda():
        model, optimizer = ...
        memory.begin()
        ...                             # forward, backward, update
        memory.peak                     # bytes

torch's fake tensors have shapes and storages of a size, but no memory and no values. `PeakMemory` sees every operation of
torch, real or fake, and counts each storage from the operation that makes it until nothing refers to it any more: weights, what
autograd keeps, gradients, the optimizer's state, and every temporary that an operation returns. What lives only inside of an
operation is not seen, except for what flash attention's backward is known to take, `flash_workspace`.

A build of torch for CPU computes with no CUDA tensors, so the fakes are the CPU's, and `choices_of_cuda` has rankup and TRL
choose as they do on a CUDA device: flash attention, and Triton's kernels, whose wrappers make their tensors and whose launches
do nothing. This patches functions, and belongs nowhere but into a measuring instrument.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from rankup.grpo.model import base_model
from rankup.kernels import shared_prompt_attention

QUERY_BLOCK = 128  # flash attention rounds the queries of a sequence up to it
HEAD_BLOCK = 32


class PeakMemory(TorchDispatchMode):
    """Bytes of the storages that are alive now, and of those that were at the peak since `begin`."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._alive: dict[int, int] = {}

    def begin(self) -> None:
        """Let the peak begin anew."""
        self.peak = self.now

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else (result,):
            if isinstance(value, torch.Tensor):
                self._count(value.untyped_storage())
        inside = WORKSPACES.get(func)
        self.peak = max(self.peak, self.now + (inside(*args) if inside else 0))
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        address = storage._cdata
        if address not in self._alive:
            self._alive[address] = storage.nbytes()
            self.now += storage.nbytes()
            weakref.finalize(storage, self._forget, address)

    def _forget(self, address: int) -> None:
        self.now -= self._alive.pop(address)


def flash_workspace(queries: int, sequences: int, keys: int, heads: tuple[int, int] | torch.Size, key_heads: int) -> int:
    """Bytes that the backward of FlashAttention-2 (arXiv 2307.08691) takes inside, in bf16.

    From its source, as torch carries it (`mha_varlen_bwd`): the queries' gradient and a number a query and head in fp32, and,
    where key heads serve several query heads, the gradients of keys and values once for each of these.
    """
    count, dim = heads
    rows = queries + QUERY_BLOCK * sequences
    expanded = 2 * keys * count * dim * 2 if key_heads != count else 0
    return 4 * rows * count * (math.ceil(dim / HEAD_BLOCK) * HEAD_BLOCK + 1) + expanded


def _of_varlen(_grad: Any, query_LHD: torch.Tensor, key_NKD: torch.Tensor, *others: Any) -> int:
    sequences = others[3].shape[0] - 1  # the fourth of them are the places at which sequences begin, and the end
    return flash_workspace(query_LHD.shape[0], sequences, key_NKD.shape[0], query_LHD.shape[1:], key_NKD.shape[1])


def _of_batch(_grad: Any, query_BHLD: torch.Tensor, key_BKLD: torch.Tensor, *others: Any) -> int:
    batch, heads, length, dim = query_BHLD.shape
    return flash_workspace(batch * length, batch, batch * key_BKLD.shape[2], (heads, dim), key_BKLD.shape[1])


WORKSPACES = {
    torch.ops.torch_attn._varlen_attn_backward.default: _of_varlen,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default: _of_batch,
}
"""Operations of which is known what they take inside."""


@contextmanager
def fake_tensors() -> Iterator[PeakMemory]:
    """Every tensor is a fake, models are made from their configurations, and their memory is counted.

    What asks for values is answered: which modules compute together is decided in a run by comparing numbers, and here taken
    to be as in every Llama and Qwen. Tests compare both on small models.
    """
    with ExitStack() as stack:
        for patch in (
            mock.patch.object(AutoModelForCausalLM, "from_pretrained", _from_config),
            mock.patch.object(nn.Module, "_apply", lambda module, function, recurse=True: module),  # `to`: fakes stay
            mock.patch.object(base_model, "_checksum", lambda weight: 0),
            mock.patch.object(shared_prompt_attention, "plan_blocks", _of_values(shared_prompt_attention.plan_blocks)),
            mock.patch.object(shared_prompt_attention, "plan_sequences", _of_values(shared_prompt_attention.plan_sequences)),
        ):
            stack.enter_context(patch)
        # Indices are real tensors: the layout of a pack is worked out from their values.
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        yield stack.enter_context(PeakMemory())


@contextmanager
def choices_of_cuda() -> Iterator[None]:
    """Let rankup and TRL choose as with bf16 on a CUDA device since Ampere."""
    with ExitStack() as stack:
        for name in (
            "rankup.kernels.lora.runs_triton",
            "rankup.kernels.lora._has_kernel",
            "rankup.kernels.logprob.runs_triton",
            "rankup.kernels.rms_norm.runs_triton",
            "rankup.kernels.attention_varlen.is_available_for",
            "trl.kernels.chunked_logprob._use_triton",
        ):
            stack.enter_context(mock.patch(name, lambda *tensors: True))
        stack.enter_context(mock.patch("triton.runtime.jit.JITFunction.run", lambda *args, **kwargs: None))
        # On CUDA a product of bf16 is summed up in fp32 in place; elsewhere TRL makes fp32 copies first.
        stack.enter_context(mock.patch("trl.kernels.chunked_logprob._addmm_fp32", lambda total, left, right: None))
        yield


def _from_config(path: str, *, dtype: torch.dtype, **options: Any) -> PreTrainedModel:
    return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path), dtype=dtype, **options)


def _of_values(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with real tensors inside."""

    def called(*arguments: Any) -> Any:
        with unset_fake_temporarily():
            return function(*arguments)

    return called
