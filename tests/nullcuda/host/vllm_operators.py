"""vLLM's own operators on the null device, in plain torch: what a Llama-like model in 16 bits with LoRA needs.

T: tokens, S: slots of a block of the KV cache, H and K: query and key heads, D: width of a head, L: keys of a sequence.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import after_import
import torch
import torch.nn.functional as F
from attention import Window, attend
from dispatch import computed_on_host, replace
from torch import Tensor


def install() -> None:
    for module in ("vllm._C_stable_libtorch", "vllm._C"):
        after_import.run(module, _replace_own)
    after_import.run("vllm.vllm_flash_attn._vllm_fa2_C", _replace_flash_attention_2)
    after_import.run("vllm.vllm_flash_attn._vllm_fa3_C", _replace_flash_attention_3)
    after_import.run("vllm.lora.ops.triton_ops.utils", _shrink_in_one_split)
    after_import.run("vllm.engine.arg_utils", _compile_without_inductor)
    after_import.run("vllm.distributed.device_communicators.cuda_wrapper", _find_null_runtime)


def _replace_own() -> None:
    functions = (rms_norm, fused_add_rms_norm, rotary_embedding, silu_and_mul, gelu_and_mul, gelu_tanh_and_mul)
    replace("_C", {function.__name__: computed_on_host(function) for function in functions})
    replace("_C_cache_ops", {"reshape_and_cache_flash": computed_on_host(reshape_and_cache_flash)})


def _replace_flash_attention_2() -> None:
    replace("_vllm_fa2_C", {"varlen_fwd": computed_on_host(flash_attention_2)})


def _replace_flash_attention_3() -> None:
    replace("_vllm_fa3_C", {"fwd": computed_on_host(flash_attention_3)})


# --- Norms, rotary embedding, activations ------------------------------------------------------------------------------------


def _normed(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    y = x.float()
    y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + eps)
    return y if weight is None else y.to(x.dtype).float() * weight.float()


def rms_norm(result: Tensor, x: Tensor, weight: Tensor | None, eps: float) -> None:
    result.copy_(_normed(x, weight, eps))


def fused_add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor | None, eps: float) -> None:
    residual.add_(x)
    x.copy_(_normed(residual, weight, eps))


def rotary_embedding(
    positions: Tensor,
    query: Tensor,
    key: Tensor | None,
    head_size: int,
    cos_sin_cache: Tensor,
    is_neox: bool,
    rope_dim_offset: int = 0,
    inverse: bool = False,
) -> None:
    assert is_neox and rope_dim_offset == 0 and not inverse, "not computed on the null device"
    cos, sin = cos_sin_cache.index_select(0, positions.flatten()).chunk(2, dim=-1)
    rotated = cos.shape[-1] * 2
    cos, sin = cos[:, None].float(), sin[:, None].float()
    for x in (query, key):
        if x is not None:
            x_THD = x.view(positions.numel(), -1, head_size)
            a, b = x_THD[..., :rotated].float().chunk(2, dim=-1)
            x_THD[..., :rotated] = torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)


def silu_and_mul(out: Tensor, x: Tensor) -> None:
    a, b = x.chunk(2, dim=-1)
    out.copy_(F.silu(a.float()).to(x.dtype) * b)


def gelu_and_mul(out: Tensor, x: Tensor) -> None:
    a, b = x.chunk(2, dim=-1)
    out.copy_(F.gelu(a) * b)


def gelu_tanh_and_mul(out: Tensor, x: Tensor) -> None:
    a, b = x.chunk(2, dim=-1)
    out.copy_(F.gelu(a, approximate="tanh") * b)


# --- The KV cache and attention ----------------------------------------------------------------------------------------------


def reshape_and_cache_flash(
    key_TKD: Tensor, value_TKD: Tensor, key_cache: Tensor, value_cache: Tensor, slots_T: Tensor, *_: Any
) -> None:
    """Write keys and values into their slots; a negative slot is none. The rest of the arguments are of quantized caches."""
    size = key_cache.shape[1]
    assert int(slots_T.max()) < key_cache.shape[0] * size, "a slot beyond the cache"
    is_kept_T = slots_T >= 0
    kept = slots_T[is_kept_T]
    for new_TKD, cache in ((key_TKD, key_cache), (value_TKD, value_cache)):
        cache[kept // size, kept % size] = new_TKD[: len(slots_T)][is_kept_T].to(cache.dtype)


def _attend_paged(
    q_THD: Tensor,
    keys: Tensor,
    values: Tensor,
    out_THD: Tensor | None,
    *,
    cum_q: Tensor,
    cum_k: Tensor | None,
    used_k: Tensor | None,
    block_table: Tensor | None,
    max_q: int,
    max_k: int,
    scale: float,
    window: Window,
) -> list[Tensor]:
    """Attention of packed sequences on a paged cache [blocks, S, K, D], or on packed keys [T, K, D] without a block table."""
    out_THD = torch.empty_like(q_THD) if out_THD is None else out_THD
    starts, places = cum_q.tolist(), cum_k.tolist() if cum_k is not None else []
    lengths = used_k.tolist() if used_k is not None else [b - a for a, b in pairwise(places)]
    lse_HT = torch.zeros(q_THD.shape[1], q_THD.shape[0], device=q_THD.device)
    assert starts[-1] <= q_THD.shape[0], "queries beyond the last token"
    for i, length in enumerate(lengths):
        a, b = starts[i], starts[i + 1]
        if a == b or length == 0:  # padding of a captured graph
            continue
        assert b - a <= min(max_q, length) and length <= max_k, f"{b - a} of {max_q} queries, {length} of {max_k} keys"
        if block_table is not None:
            blocks = block_table[i, : -(-length // keys.shape[1])].long()
            assert int(blocks.min()) >= 0 and int(blocks.max()) < keys.shape[0], "a block beyond the cache"
            k_LKD, v_LKD = (t.index_select(0, blocks).flatten(0, 1)[:length] for t in (keys, values))
        else:
            k_LKD, v_LKD = (t[places[i] : places[i + 1]] for t in (keys, values))
        one_QHD, lse_HT[:, a:b] = attend(q_THD[a:b].float(), k_LKD.float(), v_LKD.float(), scale, window)
        out_THD[a:b] = one_QHD.to(q_THD.dtype)
    return [out_THD, lse_HT]


def flash_attention_2(  # the operator's arguments, by place
    q, k, v, out, cum_q, cum_k, used_k, left_pad, block_table, alibi, max_q, max_k, dropout, scale, zero, causal, left, right,
    softcap, *_,
):  # fmt: skip
    assert softcap == 0.0 and left_pad is None and alibi is None, "not computed on the null device"
    sizes = {"cum_q": cum_q, "cum_k": cum_k, "used_k": used_k, "max_q": max_q, "max_k": max_k}
    window = Window(causal, left, right)
    return _attend_paged(q, k, v, out, block_table=block_table, scale=scale, window=window, **sizes)


def flash_attention_3(  # the operator's arguments, by place
    q, k, v, new_k, new_v, q_v, out, cum_q, cum_k, cum_new_k, used_q, used_k, max_q, max_k, block_table, batch_index, left_pad,
    cos, sin, rotary_lengths, q_scale, k_scale, v_scale, scale, causal, left, right, softcap, interleaved, metadata, splits,
    pack_heads, sm_margin, sinks, *_,
):  # fmt: skip
    assert new_k is None and sinks is None and q_v is None and softcap == 0.0, "not computed on the null device"
    sizes = {"cum_q": cum_q, "cum_k": cum_k, "used_k": used_k, "max_q": max_q, "max_k": max_k}
    window = Window(causal, left, right)
    result = _attend_paged(q, k, v, out, block_table=block_table, scale=scale, window=window, **sizes)
    return [*result, *(torch.empty(0, device=q.device) for _ in range(2))]


# --- What would be too slow, or computed past the interpreter ----------------------------------------------------------------


def _shrink_in_one_split() -> None:
    """vLLM's shrink kernel splits its sum into 64 programs and more, each of which costs the interpreter milliseconds."""
    from vllm.lora.ops.triton_ops import utils

    chosen: Callable[..., dict[str, Any]] = utils.get_lora_op_configs

    def with_one_split(op_type: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return chosen(op_type, *args, **kwargs) | ({"split_k": 1} if op_type == "shrink" else {})

    utils.get_lora_op_configs = with_one_split


def _compile_without_inductor() -> None:
    """Inductor launches its kernels past Triton's interpreter: what is compiled is computed by torch's operators instead."""
    from vllm.engine import arg_utils

    make = arg_utils.EngineArgs.__init__

    def with_eager_backend(self: Any, *args: Any, **kwargs: Any) -> None:
        config = kwargs.get("compilation_config") or {}
        if isinstance(config, dict):
            kwargs["compilation_config"] = {"backend": "eager", **config}
        elif not config.backend:
            config.backend = "eager"
        make(self, *args, **kwargs)

    arg_utils.EngineArgs.__init__ = with_eager_backend


def _find_null_runtime() -> None:
    """vLLM calls cudaMemcpy through ctypes too, in the library that is loaded as libcudart."""
    from vllm.distributed.device_communicators import cuda_wrapper

    find: Callable[[str], str | None] = vars(cuda_wrapper)["find_loaded_library"]

    def find_null(name: str) -> str | None:
        return os.environ["LD_PRELOAD"] if name == "libcudart" else find(name)

    setattr(cuda_wrapper, "find_loaded_library", find_null)  # noqa: B010  # not among its public names
