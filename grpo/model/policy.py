"""The trained policy: a frozen base model, fp32 adapter masters, and the slots they are published to.

policy = Policy("path/to/model", lora=config.lora, slots=engine.slots)    # its forward multiplies with vLLM's buffers
engine.publish(policy.write_slots)              # master weights -> slots: the engine samples with this policy now
loss, logprobs, entropy = policy.backward(pack, token_loss)
policy.save_adapter(Path("adapter"))            # PEFT's format
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from ...kernels.logprob import Head, TokenFactor, TokenLoss, linear_logprob_loss, linear_logprobs
from ..common.errors import BaseWeightsModifiedError
from ..common.files import atomic_folder
from ..config import LoraConfig
from .adapters import check_saved_config, inject, load_weights
from .arithmetic import Arithmetic
from .base_model import load_base
from .fusing import fuse
from .heads import head_of
from .lora_layers import ADAPTER, AdapterSlot, FusedLoRALayer, Master, projection
from .packing import Pack
from .routers import Routers, UseOfExperts
from .shared_prompts import (
    PACKED_ATTENTION,
    SharedPromptLayout,
    packs_of,
    plain_attention,
    set_attention,
    take_packs,
    why_prompts_cannot_be_shared,
)
from .start import StartAdapter, write_start

# Logits formed at a time: what CPU caches and memory like, and 2k to 4k tokens on a GPU, whose products want many rows.
LOGITS_MIB = {"cpu": 128, "cuda": 1024}


class Policy:
    """See the module's docstring.

    Args:
        start: the adapter to begin with, as `resolve_start` gives it with `lora`; None: a new one.
        load_in, shared: in which form and in whose memory the base is held, see `load_base`.
        slots: the engine's, see `attach`; None: slots of its own.
        deterministic: `backward` gives the same gradients each time on CUDA too, see `kernels/numerics.py`.
        experts: what is done with the sampler's choice of experts, see `routers.py`.

    Attributes:
        base: the base model, and how much of it only the trainer holds.
        dtype: of the base's weights and of the slots.
        model: the transformers model with PEFT's layers inside.
        layers: the adapted layers by their name in the model.
        target_notes: what the preset of `lora.targets` leaves out, and why.
        shares_prompts: whether packs may hold each prompt once; if not, `plain_reason` says why.
        routers: of a mixture of experts; None if the sampler's choice of experts is ignored.
        fusion: which layers compute together, which do not, and why.

    Raises:
        ValueError: the model cannot be adapted as configured, or does something after its head that is not implemented.
    """

    def __init__(
        self,
        model_path: str,
        *,
        lora: LoraConfig,
        start: StartAdapter | None = None,
        dtype: str = "bfloat16",
        seed: int = 0,
        device: str = "cpu",
        gradient_checkpointing: bool = False,
        logits_mib: int | None = None,
        load_in: Literal["nf4"] | None = None,
        shared: Mapping[str, torch.Tensor] | None = None,
        slots: Mapping[str, AdapterSlot] | None = None,
        deterministic: bool = False,
        experts: UseOfExperts = "ignore",
    ) -> None:
        self.base = load_base(model_path, dtype=getattr(torch, dtype), device=device, load_in=load_in, shared=shared)
        base = self.base.model
        self._bare_head = head_of(base)
        self.plain_reason = why_prompts_cannot_be_shared(base)
        self.shares_prompts = self.plain_reason is None
        if self.shares_prompts:
            take_packs(base)
        set_attention(base, plain_attention(base))
        self._is_packed = False
        self._checkpoints_gradients = False
        self.device = device
        self.dtype: torch.dtype = getattr(torch, dtype)
        self._arithmetic = Arithmetic(self.dtype, device, deterministic)
        self._logits_bytes = 2**20 * (logits_mib or LOGITS_MIB.get(device, LOGITS_MIB["cuda"]))
        self.model = base
        self.routers = None if experts == "ignore" else Routers(base, replay=experts == "replay")
        self.peft_model, self.target_notes = inject(base, lora, seed)
        self.layers = {name: module for name, module in base.named_modules() if isinstance(module, FusedLoRALayer)}
        if start is not None:
            write_start(self.layers, start)
        self._reference: list[tuple[torch.Tensor, torch.Tensor]] | None = None
        self.attach(self._local_slots(lora.max_rank, getattr(torch, dtype)) if slots is None else slots)
        self.write_slots()
        self.fusion = fuse(base, self._any_forward)
        if self.routers is not None:
            self.routers.check(self._any_forward)
        self._checkpoints_gradients = gradient_checkpointing
        if gradient_checkpointing:
            base.gradient_checkpointing_enable()
        self._modules = tuple(base.modules())

    # ------------------------------------------------------------------------------------------- adapter

    @property
    def masters(self) -> list[nn.Parameter]:
        """All fp32 parameters that are trained: A and B of each layer in turn."""
        return [master.parameter for master in self.master_roles]

    @property
    def master_roles(self) -> list[Master]:
        """The same parameters in the same order, each with its role, and with the scale and the rank of its layer."""
        return [master for layer in self.layers.values() for master in layer.masters]

    def attach(self, slots: Mapping[str, AdapterSlot]) -> None:
        """Compute with these slots from now on (vLLM's buffers). All are emptied, those of projections that are not trained
        too: nothing may stay of an adapter of higher rank or of other targets. They hold the policy after `write_slots`.

        Raises:
            ValueError: a trained projection has no slot, or one of another shape.
        """
        missing = [name for name in self.layers if name not in slots]
        if missing:
            raise ValueError(f"the sampler has no adapter slot for {missing[:3]} ({len(missing)} projections in all)")
        for name, layer in self.layers.items():
            slot, rank = slots[name], layer.rank
            fits = slot.max_rank >= rank and slot.a.shape[1] == layer.in_features and slot.b.shape[0] == layer.out_features
            if not fits:
                raise ValueError(
                    f"{name}: slot of shapes {list(slot.a.shape)} and {list(slot.b.shape)} for an adapter of rank {rank} "
                    f"from {layer.in_features} to {layer.out_features}"
                )
        for slot in slots.values():
            slot.a.zero_()
            slot.b.zero_()
        for name, layer in self.layers.items():
            layer.slot = slots[name]
        # Views of the slots, made once: publishing is a handful of calls over them.
        self._adapters = [layer.adapter for layer in self.layers.values()]

    @torch.no_grad()
    def write_slots(self) -> None:
        """Master weights to slots: `a = A`, `b = scaling * B`, rounded once to the sampler's dtype. They do not change."""
        self._check_base_weights(thoroughly=False)
        self._copy_masters_to_slots()

    def _copy_masters_to_slots(self) -> None:
        all_of = self._adapters
        torch._foreach_copy_([one.a for one in all_of], [one.master_a.data for one in all_of])  # type: ignore[attr-defined]
        scaled = torch._foreach_mul([one.master_b.data for one in all_of], [one.scaling for one in all_of])  # type: ignore[attr-defined]
        torch._foreach_copy_([one.b for one in all_of], scaled)  # type: ignore[attr-defined]

    def save_adapter(self, folder: Path) -> None:
        """Write the adapter in PEFT's format. What stood in `folder` is replaced only once the new one is complete."""
        self._check_base_weights(thoroughly=True)
        with atomic_folder(folder) as partial:
            # PEFT would add the embedding's weights to an adapter on the head, but the adapter does not change them.
            self.peft_model.save_pretrained(str(partial), save_embedding_layers=False)

    def load_adapter(self, folder: Path) -> None:
        """Read the master weights from an adapter in PEFT's format. Publish afterwards.

        Raises:
            ValueError: no adapter there, or one of another kind, scale or shapes. Nothing was read then.
        """
        if not (folder / "adapter_model.safetensors").is_file():
            raise ValueError(f"no adapter in {folder}: adapter_model.safetensors is missing")
        check_saved_config(folder, self.peft_model.peft_config[ADAPTER])
        load_weights(self.peft_model, folder, device=self.device)

    # ----------------------------------------------------------------------------------------- reference

    def keep_reference(self) -> None:
        """Keep the adapter in the slots as the reference policy, in host memory."""
        self._reference = [(one.a.to("cpu", copy=True), one.b.to("cpu", copy=True)) for one in self._adapters]

    @contextmanager
    def as_reference(self) -> Iterator[None]:
        """Within it, the model computes the reference policy: what `keep_reference` has kept, else the base model.

        The slots then hold the reference: nothing may sample or train. Afterwards they hold the master weights again.
        """
        if self._reference is None:
            with self.peft_model.disable_adapter():
                yield
            return
        try:
            with torch.no_grad():
                for one, (a, b) in zip(self._adapters, self._reference, strict=True):
                    one.a.copy_(a)
                    one.b.copy_(b)
            yield
        finally:
            self._copy_masters_to_slots()

    # ------------------------------------------------------------------------------------------ computing

    @torch.no_grad()
    def logprobs(self, pack: Pack, *, temperature: float = 1.0, use_adapter: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probability of every target of the pack and the entropy there, [N] each, without gradient."""
        with self._over(pack), nullcontext() if use_adapter else self.peft_model.disable_adapter():
            hidden_ND, head = self._hidden(pack), self.head
        return linear_logprobs(hidden_ND, head, pack.targets_N, temperature=temperature, chunk_bytes=self._logits_bytes)

    def backward(
        self,
        pack: Pack,
        token_loss: TokenLoss,
        *,
        temperature: float = 1.0,
        passes: Literal[1, 2] = 1,
        factor: TokenFactor | None = None,
        loss_scale: float | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """One forward and one backward; gradients are added to the master weights'. Returns loss, logprobs [N], entropy [N].

        `passes`: over the logits; 2 where the loss of a token depends on other tokens. `factor`: of each token's loss, known
        once all log-probabilities are. `loss_scale`: of all gradients, not of the loss that is returned. See
        `linear_logprob_loss` for these.
        """
        with self._over(pack, counts_flips=True), self._arithmetic.repeatable():
            loss, logprobs_N, entropy_N = linear_logprob_loss(
                self._hidden(pack),
                self.head,
                pack.targets_N,
                token_loss,
                temperature=temperature,
                chunk_bytes=self._logits_bytes,
                passes=passes,
                factor=factor,
                loss_scale=loss_scale,
            )
            loss.backward()
        return loss.detach(), logprobs_N, entropy_N

    def _check_base_weights(self, *, thoroughly: bool) -> None:
        written = self.base.written(thoroughly=thoroughly)
        if written:
            raise BaseWeightsModifiedError(
                f"{len(written)} base weights were modified during the run, {written[0]} among them: the adapter does not fit "
                "them any more, and vLLM may share them. Do not merge or train the base model in the process of a run; resume "
                "from the newest checkpoint"
            )

    def any_pass(self) -> None:
        """A forward and backward of the model on two tokens. Leaves no gradients."""
        with self._two_tokens() as hidden:
            torch.autograd.grad(hidden.sum(), self.masters, allow_unused=True)

    def _any_forward(self) -> torch.Tensor:
        """The hidden states of the model, on two tokens."""
        with self._two_tokens() as hidden:
            return hidden

    @contextmanager
    def _two_tokens(self) -> Iterator[torch.Tensor]:
        """The hidden states of the model on two tokens; within it, their backward pass may follow."""
        inputs: dict[str, Any] = {"input_ids": torch.zeros(1, 2, dtype=torch.long, device=self.device)}
        layout = None
        if self.shares_prompts:
            layout = SharedPromptLayout.build([(2, [])], self.device)
        with self.packed(), packs_of(layout):
            yield self.model.base_model(**inputs, use_cache=False).last_hidden_state

    def _hidden(self, pack: Pack) -> torch.Tensor:
        inputs: dict[str, Any] = {"attention_mask": pack.attention_mask}
        if pack.layout is not None:
            inputs = {"position_ids": pack.position_ids}
        output = self.model.base_model(input_ids=pack.input_ids, **inputs, use_cache=False)
        return pack.sources.gather(output.last_hidden_state.flatten(0, 1))

    @contextmanager
    def _over(self, pack: Pack, *, counts_flips: bool = False) -> Iterator[None]:
        """Around forward and backward of a pack."""
        routing = nullcontext() if self.routers is None else self.routers.over(pack.routed_experts, counts=counts_flips)
        with self.packed(), packs_of(pack.layout), routing:
            yield

    @property
    def head(self) -> Head:
        """The output layer as the kernels take it, with its adapter if it has one that is not disabled."""
        layer = self.model.get_output_embeddings()
        return dataclasses.replace(self._bare_head, adapter=projection(cast(nn.Module, layer)).adapter)

    @property
    def slots(self) -> dict[str, AdapterSlot]:
        """The slots of the adapted layers, by their name in the model."""
        return {name: layer.slot for name, layer in self.layers.items()}

    @contextmanager
    def packed(self) -> Iterator[None]:
        """Within it, the model takes packs. Outside, it is the model that any code of transformers can call, `generate` too.

        The methods of this class enter it by themselves; entering it around many calls saves switching at each.
        """
        if self._is_packed:
            yield
            return
        self._is_packed = True
        if self.shares_prompts:
            set_attention(self.model, PACKED_ATTENTION)
        if self._checkpoints_gradients:
            # Only layers in training mode recompute. Not the modules inside: in training mode Mamba's kernels would read the
            # weight of its output projection and leave out the adapter.
            for module in self._modules:
                if isinstance(module, GradientCheckpointingLayer):
                    module.training = True
        try:
            with self._arithmetic.products():
                yield
        finally:
            self._is_packed = False
            self.model.eval()
            if self.shares_prompts:
                set_attention(self.model, plain_attention(self.model))

    @contextmanager
    def sampling(self, *, use_adapter: bool = True) -> Iterator[None]:
        """Within it, the model is used with or without the adapter, and records no gradient."""
        assert not self._is_packed, "the model takes packs, not padded rows"
        # A user's callback may have left it in training mode, in which transformers uses no cache. This is entered for each
        # token: `eval()` would take a seventh of the time of a small model.
        if any(module.training for module in self._modules):
            self.model.eval()
        without_adapter = nullcontext() if use_adapter else self.peft_model.disable_adapter()
        with torch.no_grad(), self._arithmetic.products(), without_adapter:
            yield

    def _local_slots(self, max_rank: int, dtype: torch.dtype) -> dict[str, AdapterSlot]:
        return {
            name: AdapterSlot.empty(
                max_rank=max_rank,
                in_features=layer.master_a.shape[1],
                out_features=layer.master_b.shape[0],
                dtype=dtype,
                device=self.device,
            )
            for name, layer in self.layers.items()
        }
