"""vLLM's errors at its start, in one line and with the names of the options here, and that of both engines about logits.

    with in_our_names(config.rollout, on_cpu=False):
        engine = LLMEngine.from_engine_args(args)
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from .config import RolloutConfig

NOT_FINITE = (
    "the policy's logits are not finite, so nothing can be sampled: resume from an earlier checkpoint with a lower "
    "optim.learning_rate, or, in model.dtype=float16, whose range ends at 65504, set bfloat16 or float32"
)
LENGTHS = "rollout.max_prompt_length + rollout.max_completion_length"

_TOO_LONG = re.compile(r"max_model_len \((\d+)\) is greater than the derived max_model_len \((\w+)=([\d.]+)")
_CACHE = re.compile(
    r"max seq len \((\d+)\), \(([\d.]+) GiB KV cache is needed, .* cache memory \(([\d.]+) GiB\)\."
    r"(?:.*maximum model length is (\d+))?",
    re.DOTALL,
)
_NO_CACHE = re.compile(r"No available memory for the cache blocks")
_FREE = re.compile(r"\(([\d.]+)/([\d.]+) GiB\) on startup is less than .*?\([\d.]+, ([\d.]+) GiB\)", re.DOTALL)
_CPU_CACHE = re.compile(r"\(([\d.]+)/[\d.]+ GiB\) on kv cache allocation is less than requested memory for kv \(([\d.]+)")
_NOT_INSPECTED = re.compile(r"Model architectures \['(\w+)'\] failed to be inspected")
_INVALID = re.compile(r"validation errors? for \w+\n\s*(?:Value error, |Assertion failed, )?(.*?) \[type=", re.DOTALL)
_OUT_OF_MEMORY = re.compile(r"out of memory|can't allocate memory", re.IGNORECASE)


def cache_too_small(tokens: int, *, needed: float, available: float, memory: str, longest: int | None = None) -> str:
    """The message for a KV cache that has no room for one sequence.

    Args:
        needed, available: bytes.
        memory: the option that says how large the cache is.
        longest: tokens that it has room for, if known.
    """
    at_most = f" to at most {longest} tokens together" if longest else ""
    return (
        f"the KV cache has {available / 2**30:.3g} GiB, and a sequence of {tokens} tokens ({LENGTHS}) needs "
        f"{needed / 2**30:.3g} GiB: raise {memory}, or lower the lengths{at_most}"
    )


@contextmanager
def in_our_names(rollout: RolloutConfig, *, on_cpu: bool) -> Iterator[None]:
    """Raise vLLM's errors about lengths, memory and models as ValueErrors of one line that name the options; others pass."""
    try:
        yield
    except (ValueError, RuntimeError, MemoryError) as error:
        message = _message(str(error), rollout, on_cpu=on_cpu)
        if message is None:
            raise
        raise ValueError(message) from error


def _message(text: str, rollout: RolloutConfig, *, on_cpu: bool) -> str | None:
    """What vLLM's error means here; None if it is about something else."""
    memory = "rollout.kv_cache_gib" if on_cpu else "rollout.gpu_memory_utilization"
    if found := _TOO_LONG.search(text):
        wanted, key, limit = found.groups()
        return f"{LENGTHS} is {wanted} tokens, and the model's context ends at {float(limit):g} ({key}): lower one of them"
    if found := _CACHE.search(text):
        wanted, needed, available, longest = found.groups()
        sizes = {"needed": float(needed) * 2**30, "available": float(available) * 2**30}
        return cache_too_small(int(wanted), **sizes, memory=memory, longest=int(longest) if longest else None)
    if _NO_CACHE.search(text):
        return f"{memory} {_value(rollout, on_cpu)} leaves no memory for vLLM's KV cache: raise it, or use a smaller model"
    if found := _FREE.search(text):
        free, total, wanted = found.groups()
        return (
            f"rollout.gpu_memory_utilization {_value(rollout, on_cpu)} is {wanted} GiB, and {free} of {total} GiB are "
            "free: lower it, or end what else uses the device"
        )
    if found := _CPU_CACHE.search(text):
        free, wanted = found.groups()
        return f"rollout.kv_cache_gib is {wanted}, and {free} GiB of memory are free: lower it"
    if found := _NOT_INSPECTED.search(text):
        return (
            f"vLLM cannot import its code for {found[1]}: a package that it needs is missing (such as torchvision on CPU). "
            "Install it, or set rollout.engine=torch"
        )
    if found := _INVALID.search(text):  # pydantic's, with all of vLLM's arguments behind it
        return f"vLLM refuses this configuration: {' '.join(found[1].split())}"
    if _OUT_OF_MEMORY.search(text):
        return (
            f"there was too little memory to start vLLM: lower {memory} (now {_value(rollout, on_cpu)}), rollout.max_num_seqs "
            f"or the lengths ({LENGTHS}), or set model.load_in=nf4 ({text.splitlines()[0]})"
        )
    return None


def _value(rollout: RolloutConfig, on_cpu: bool) -> str:
    if on_cpu:
        return f"{rollout.kv_cache_gib:g}"
    share = rollout.gpu_memory_utilization
    return "(not set)" if share is None else f"{share:g}"
