"""The memory of a training pass, measured on tensors that have sizes and neither values nor memory.

    with fake_tensors() as memory, paths_of_cuda():
        policy = Policy(...)                # the real code: model, adapter, forward, backward
        memory.begin()
        ...
        memory.peak                         # bytes

    measure_pass(folder, config, device="cuda")     # {"activations": ..., "logits_chunk": ..., "hidden_states": ...}

torch's fake tensors have shapes and storages of a size. `PeakMemory` sees every operation of torch, real or fake, and counts
each storage from the operation that makes it until nothing refers to it any more. Memory that lives only inside of an operation
is not seen, except for the workspace of flash attention's backward (`flash_workspace`). A build of torch for CPU cannot compute
gradients of CUDA tensors, so the fakes are the CPU's, and `kernels.device.paths_of_cuda` selects the code paths of CUDA.

All layers of a decoder take the same memory, so a pass is measured with two layers, and what each further one keeps is added:
exactly what the full depth takes, as tests show, in half a second where 32 layers take half a minute.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import tempfile
import weakref
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode

from ...kernels.attention_plan import BlockPlan
from ...kernels.attention_varlen import SequencePlan
from ...kernels.device import paths_of_cuda
from ...kernels.recurrence_plan import RecurrencePlan, Windows, plan_recurrence
from ...kernels.shared_prompt_attention import SharedPromptLayout
from ...rollout.types import Completion
from ..algorithm.losses import Counts
from ..config import GRPOConfig
from ..data.groups import Group
from ..data.prompts import Prompt
from ..model.packing import Pack, pack, pad
from ..model.policy import LOGITS_MIB, Policy
from ..update.objective import Objective, StepConstants

QUERY_BLOCK = 128  # flash attention rounds the queries of a sequence up to it
HEAD_BLOCK = 32
LAYERS = 2  # that are measured: the last one has another one before it, as all but the first have
PASS_PARTS = ("activations", "logits_chunk", "hidden_states", "layer_backward", "layer_again")
Sizes = Sequence[tuple[int, Sequence[int]]]
"""Prompt length and completion lengths of each group, in tokens."""

# ---------------------------------------------------------------------------------------------------------- instrument


class PeakMemory(TorchDispatchMode):
    """Bytes of the storages that are alive now, and of those that were at the peak since `begin`.

    Attributes:
        label: what new storages are counted as.
        at_peak: bytes at the peak by label.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.label = ""
        self.at_peak: Counter[str] = Counter()
        self._by_label: Counter[str] = Counter()
        self._alive: dict[int, tuple[str, int]] = {}

    def begin(self) -> None:
        """Forget the peak so far."""
        self.peak, self.at_peak = self.now, self._by_label.copy()

    def label_of(self, tensor: torch.Tensor) -> str:
        """The label under which the storage of this new tensor is counted."""
        return self.label

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else (result,):
            if isinstance(value, torch.Tensor):
                self._count(value)
        inside = WORKSPACES[func](*args) if func in WORKSPACES else 0
        if self.now + inside > self.peak:
            self.peak, self.at_peak = self.now + inside, self._by_label.copy()
            self.at_peak[self.label] += inside
        return result

    def _count(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        address = storage._cdata
        if address not in self._alive:
            label, size = self.label_of(tensor), storage.nbytes()
            self._alive[address] = label, size
            self._by_label[label] += size
            self.now += size
            weakref.finalize(storage, self._free, address)

    def _free(self, address: int) -> None:
        label, size = self._alive.pop(address)
        self._by_label[label] -= size
        self.now -= size


def flash_workspace(queries: int, sequences: int, keys: int, heads: tuple[int, int] | torch.Size, key_heads: int) -> int:
    """Bytes that the backward of FlashAttention-2 (arXiv 2307.08691) takes inside, in bf16.

    From its source, as in torch (`mha_varlen_bwd`): the queries' gradient and a number a query and head in fp32, and, if a key
    head serves several query heads, the gradients of keys and values once for each of these.
    """
    count, dim = heads
    rows = queries + QUERY_BLOCK * sequences
    expanded = 2 * keys * count * dim * 2 if key_heads != count else 0
    return 4 * rows * count * (math.ceil(dim / HEAD_BLOCK) * HEAD_BLOCK + 1) + expanded


def _of_varlen(_grad: Any, query_LHD: torch.Tensor, key_NKD: torch.Tensor, *others: Any) -> int:
    sequences = others[3].shape[0] - 1  # the fourth holds where sequences begin, and the end
    return flash_workspace(query_LHD.shape[0], sequences, key_NKD.shape[0], query_LHD.shape[1:], key_NKD.shape[1])


def _of_batch(_grad: Any, query_BHLD: torch.Tensor, key_BKLD: torch.Tensor, *others: Any) -> int:
    batch, heads, length, dim = query_BHLD.shape
    return flash_workspace(batch * length, batch, batch * key_BKLD.shape[2], (heads, dim), key_BKLD.shape[1])


WORKSPACES = {
    torch.ops.torch_attn._varlen_attn_backward.default: _of_varlen,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default: _of_batch,
}
"""Operations with a workspace of known size."""


@contextmanager
def fake_tensors(memory: PeakMemory | None = None) -> Iterator[PeakMemory]:
    """Every new tensor is a fake and its memory is counted; a policy reads no weights. Pass indices as real tensors."""
    from ...kernels import nf4

    if importlib.util.find_spec("bitsandbytes") is not None:
        nf4._code(torch.device("cpu"))  # cached from here on: a real tensor, and no fake of a mode that has ended
    apply = nn.Module._apply
    nn.Module._apply = lambda module, function, recurse=True: module  # type: ignore[method-assign]  # `to`: fakes stay
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), memory or PeakMemory() as counted:
            yield counted
    finally:
        nn.Module._apply = apply  # type: ignore[method-assign]


# ---------------------------------------------------------------------------------------------------------------- packs


def full_pack(tokens: int, *, prompt: int, completion: int, generations: int) -> list[tuple[int, list[int]]]:
    """Sizes of groups that fill a pack of `tokens` input tokens exactly; the last group and completion may be shorter.

    A completion's last token is no input.
    """
    groups: list[tuple[int, list[int]]] = []
    left = tokens
    while left > 0:
        length = min(prompt, max(1, left - 1))
        left -= length
        completions = []
        while left > 0 and len(completions) < generations:
            inputs = min(completion - 1, left)
            completions.append(inputs + 1)
            left -= inputs
        groups.append((length, completions or [1]))
    return groups


def make_pack(policy: Policy, sizes: Sizes, *, tokens_per_pack: int) -> Pack:
    """The first pack of groups of these sizes, as real tensors without content."""
    with unset_fake_temporarily():
        groups = [
            Group(
                prompt=Prompt(content="", token_ids=(0,) * prompt),
                completions=tuple(_completion(length) for length in lengths),
                advantages=(1.0,) * len(lengths),
            )
            for prompt, lengths in sizes
        ]
        if not policy.shares_prompts:
            return pad(groups, tokens_per_pack=tokens_per_pack, pad_token_id=0)[0]
        one = pack(groups, tokens_per_pack=tokens_per_pack)[0]
        layout = cast(SharedPromptLayout, one.layout)
        return dataclasses.replace(one, layout=_LayoutOfValues(layout.groups, layout.length))


class _LayoutOfValues(SharedPromptLayout):
    """Plans are worked out from values, so with real tensors."""

    def block_plan(self, heads: int, key_heads: int, window: int | None = None) -> BlockPlan:
        with unset_fake_temporarily():
            return super().block_plan(heads, key_heads, window)

    def sequence_plan(self, window: int | None = None) -> SequencePlan:
        with unset_fake_temporarily():
            return super().sequence_plan(window)

    @cached_property
    def recurrence_plan(self) -> RecurrencePlan:
        with unset_fake_temporarily():
            one = plan_recurrence(self._lengths, self.device)
        return _RecurrenceOfValues(one.prompts, one.completions, one.prompt_of, one.places_L, one.sequences, one.device)


class _RecurrenceOfValues(RecurrencePlan):
    def windows(self, taps: int) -> Windows:
        with unset_fake_temporarily():
            return super().windows(taps)


def _completion(tokens: int) -> Completion:
    logprobs = (-1.0,) * tokens
    return Completion(token_ids=(0,) * tokens, logprobs=logprobs, text="", finish_reason="length", policy_version=0)


def backward_pass(policy: Policy, one: Pack, config: GRPOConfig) -> None:
    """Forward and backward of one pack with the configured objective; gradients are added to those of the master weights."""
    tokens, sequences = len(one.targets_N), len(one.lengths_S)
    counts = Counts(
        sequences=sequences,
        tokens=tokens,
        local_tokens=tokens,
        max_completion_length=config.rollout.max_completion_length,
    )
    constants = StepConstants(counts=counts, entropy_tokens=tokens)
    loss = Objective(config).of(one, constants, old_logprobs_N=None, reference_logprobs_N=None)
    policy.backward(one, loss.token_loss, passes=loss.passes, factor=loss.factor)


# ----------------------------------------------------------------------------------------------------- a measured pass


class _PassMemory(PeakMemory):
    """Labels the storages of a pass: activations, the head's, the backward's. See `measure_pass`."""

    def __init__(self) -> None:
        super().__init__()
        self.vocabulary = 0
        self.after_layers: list[int] = []  # bytes after each of the layers in the forward

    def label_of(self, tensor: torch.Tensor) -> str:
        is_logits = self.label == "hidden_states" and tensor.dim() == 2 and tensor.shape[1] == self.vocabulary
        return "logits_chunk" if is_logits else self.label

    @contextmanager
    def labelled(self, label: str) -> Iterator[None]:
        """Another label within the block."""
        before, self.label = self.label, label
        try:
            yield
        finally:
            self.label = before

    def watch(self, policy: Policy) -> None:
        """Set labels as the pass goes from the layers to the head, and from the head to the backward."""
        base = policy.model.base_model
        assert isinstance(base, nn.Module)

        def after_layer(*_: Any) -> None:
            if self.label == "activations":
                self.after_layers.append(self.now)

        def after_base(_module: nn.Module, _inputs: Any, output: Any) -> None:
            self.label = "hidden_states"
            if output.last_hidden_state.requires_grad:  # not if the head alone has an adapter
                output.last_hidden_state.register_hook(lambda grad: setattr(self, "label", "layer_backward"))

        depth = policy.model.config.get_text_config().num_hidden_layers
        stacks = [module for module in base.modules() if isinstance(module, nn.ModuleList) and len(module) == depth]
        for layer in stacks[0]:
            layer.register_forward_hook(after_layer)
        base.register_forward_hook(after_base)


def measure_pass(
    model_config: dict[str, Any], config: GRPOConfig, *, device: Literal["cuda", "cpu"], depth: int | None = None
) -> dict[str, int]:
    """Bytes on top of weights, adapter, gradients and optimizer state at the peak of a full pack's forward and backward.

    Args:
        model_config: content of a `config.json`.
        depth: layers that are measured; the others are taken to be like the last of these. None: `LAYERS`.

    Returns:
        "activations", and what comes on top of them at the peak: "logits_chunk" and "hidden_states", or "layer_backward" and,
        with gradient checkpointing, "layer_again".
    """
    layers = int(model_config["num_hidden_layers"])
    measured = min(layers, depth or LAYERS)
    memory = _PassMemory()
    paths = paths_of_cuda() if device == "cuda" else nullcontext()
    with tempfile.TemporaryDirectory(prefix="rankup-plan-") as folder, fake_tensors(memory), paths:
        Path(folder, "config.json").write_text(json.dumps(_shallow(model_config, measured)), encoding="utf-8")
        policy = Policy(
            folder,
            lora=config.lora,
            dtype=config.model.dtype,
            gradient_checkpointing=config.optim.gradient_checkpointing,
            logits_mib=config.optim.logits_mib or LOGITS_MIB[device],
            load_in=config.model.load_in,
        )
        if config.optim.gradient_checkpointing:
            recompute = {"use_reentrant": False, "context_fn": lambda: (nullcontext(), memory.labelled("layer_again"))}
            policy.model.gradient_checkpointing_enable(recompute)
        for master in policy.masters:
            master.grad = torch.empty_like(master)  # of the passes before
        memory.vocabulary = policy.head.weight_VD.shape[0]
        memory.watch(policy)
        memory.label = "activations"
        memory.begin()
        backward_pass(policy, _full_pack_of(policy, config), config)
        parts = memory.at_peak
    if measured > 1:
        parts["activations"] += (layers - measured) * (memory.after_layers[-1] - memory.after_layers[-2])
    return {name: parts[name] for name in PASS_PARTS if parts[name]}


def _full_pack_of(policy: Policy, config: GRPOConfig) -> Pack:
    rollout, tokens = config.rollout, config.optim.tokens_per_pack
    assert tokens is not None, "the size of a pack is decided before it is measured"
    prompt, completion, generations = rollout.max_prompt_length, rollout.max_completion_length, rollout.num_generations
    if policy.shares_prompts:
        sizes = full_pack(tokens, prompt=prompt, completion=completion, generations=generations)
    else:
        sizes = [(prompt, [completion] * max(1, tokens // (prompt + completion - 1)))]
    return make_pack(policy, sizes, tokens_per_pack=max(tokens, prompt + completion - 1))


def _shallow(model_config: dict[str, Any], layers: int) -> dict[str, Any]:
    """The configuration with fewer layers. Lists with an entry for each layer are cut."""
    depth = model_config["num_hidden_layers"]
    cut = {key: value[:layers] for key, value in model_config.items() if isinstance(value, list) and len(value) == depth}
    return {**model_config, **cut, "num_hidden_layers": layers}
