"""The sides of the training benchmarks, each in a separate process: rankup's learner, and stock transformers with PEFT.

Both take the same groups, adapter values, objective (DAPO, on-policy, no KL penalty), clipping and AdamW.

Legend: B rows (completions), R tokens of each completion, T tokens of a row, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from cases import Case, randomise_adapter
from peft import PeftModel, load_peft_weights, set_peft_model_state_dict
from peft_side import PeftSide, logprobs_of
from process_memory import reset_peak, resident_bytes, return_freed_memory
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from rankup.grpo.common.model_files import resolve_model
from rankup.grpo.common.quiet import quiet_stderr
from rankup.grpo.config import GRPOConfig
from rankup.grpo.config.optim import USUAL_TOKENS_PER_PACK
from rankup.grpo.model.packing import pack
from rankup.grpo.model.policy import Policy
from rankup.grpo.update.learner import Learner
from rankup.kernels.cpu_memory import keep_freed_memory
from rankup.kernels.device import native_dtype

MODEL = "smollm2-135m-instruct"
RANK, ALPHA = 64, 32
ADAPTER_STD = 0.1  # of B's entries: large enough to matter, small enough for the model to keep working
GRADIENTS_FILE = "gradients.safetensors"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Side:
    """Time and memory of a step. `begin` comes first: it sets the case, the initial adapter and a new optimizer."""

    _loaded_bytes = 0

    def begin(self, case: Case) -> None:
        raise NotImplementedError

    def step(self) -> None:
        raise NotImplementedError

    def seconds(self) -> float:
        """Seconds of a step."""
        _synchronize()
        started = time.perf_counter()
        self.step()
        _synchronize()
        return time.perf_counter() - started

    def peak_bytes(self) -> int:
        """Peak memory of two steps (the second has optimizer state) above that of the loaded model: resident memory, on CUDA
        what torch has allocated."""
        return_freed_memory()
        if DEVICE == "cuda":
            torch.cuda.reset_peak_memory_stats()
        else:
            reset_peak()
        self.step()
        self.step()
        peak = torch.cuda.max_memory_allocated() if DEVICE == "cuda" else resident_bytes("VmHWM")
        return peak - self._loaded_bytes

    def _note_loaded(self, weights: Iterable[torch.Tensor]) -> None:
        for weight in weights:  # mapped from the file; resident only after they are read
            weight.sum()
        return_freed_memory()
        self._loaded_bytes = torch.cuda.memory_allocated() if DEVICE == "cuda" else resident_bytes("VmRSS")


class RankupSide(Side):
    """rankup's policy and learner with a random adapter, which is saved for the other side in `adapter_folder`."""

    def __init__(self, *, rank: int = RANK, adapter_folder: Path | None = None) -> None:
        keep_freed_memory()
        self.model_path = resolve_model(MODEL)
        # No engine sampled the tokens, so there is no mismatch to correct and nothing for guards to judge.
        self._config = GRPOConfig(
            lora={"rank": rank, "alpha": ALPHA},
            model={"name": MODEL, "dtype": native_dtype()},
            correction={"mode": "none"},
            guards={"enabled": False},
        )
        with quiet_stderr():
            self._policy = Policy(self.model_path, lora=self._config.lora, dtype=self._config.model.dtype, device=DEVICE)
        randomise_adapter(self._policy, ADAPTER_STD)
        self._initial = [master.detach().clone() for master in self._policy.masters]
        if adapter_folder is not None:
            self._policy.save_adapter(adapter_folder)
        self._note_loaded(self._policy.model.parameters())

    def describe(self) -> dict[str, Any]:
        """Settings for the result."""
        return {
            "adapter_parameters": sum(master.numel() for master in self._policy.masters),
            "threads": torch.get_num_threads(),
            "device": torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu",
            **self._config.model_dump(mode="json", include={"model", "lora", "algorithm", "optim"}),
        }

    @torch.no_grad()
    def begin(self, case: Case) -> None:
        self._learner = None
        for master, initial in zip(self._policy.masters, self._initial, strict=True):
            master.copy_(initial)
        self._policy.write_slots()
        self._groups = case.groups()
        self._learner = Learner(self._policy, self._config)

    def step(self) -> None:
        """One update, as the trainer calls it."""
        assert self._learner is not None
        self._learner.update(self._groups, step=0)

    def num_tokens(self) -> int:
        """Tokens that pass through the model in a step."""
        return sum(one.num_input_tokens for one in self._packs())

    def probe(self, folder: Path) -> dict[str, Any]:
        """Loss, gradient norm before clipping, and log-probabilities with and without the adapter; gradients go to `folder`."""
        frozen = {"max_grad_norm": 1e9, "learning_rate": 1e-30}  # neither clipping nor the update changes anything
        config = self._config.model_copy(update={"optim": self._config.optim.model_copy(update=frozen)})
        learner = Learner(self._policy, config)
        gradients: dict[str, torch.Tensor] = {}
        learner.optimizer.register_step_pre_hook(lambda *_: gradients.update(_gradients(self._policy.peft_model)))
        metrics = learner.update(self._groups, step=0).metrics
        save_file(gradients, folder / GRADIENTS_FILE)
        return {
            "loss": metrics["loss"],
            "grad_norm": metrics["grad_norm"],
            "logprobs": self._logprobs(use_adapter=True),
            "base_logprobs": self._logprobs(use_adapter=False),
        }

    def _packs(self) -> list[Any]:
        tokens = self._config.optim.tokens_per_pack or USUAL_TOKENS_PER_PACK
        return pack(self._groups, tokens_per_pack=tokens, device=DEVICE)

    def _logprobs(self, *, use_adapter: bool) -> list[float]:
        return [x for one in self._packs() for x in self._policy.logprobs(one, use_adapter=use_adapter)[0].tolist()]


class StockSide(PeftSide, Side):
    """Stock transformers and PEFT with the saved adapter: one row per completion, logits, torch's log-softmax.

    Args:
        adapter_folder: where rankup's side saved its adapter. PEFT keeps it in fp32, its default.
        keep_memory: keep freed memory, as rankup does.
        completion_logits: ask the model for logits of completions only (`logits_to_keep`).
        autocast: run the model under bf16 autocast, as transformers' Trainer does with `bf16=True`; then the products of the
            adapter are bf16.
    """

    def __init__(
        self, *, adapter_folder: Path, keep_memory: bool = False, completion_logits: bool = False, autocast: bool = False
    ) -> None:
        if keep_memory:
            keep_freed_memory()
        self._adapter_folder = adapter_folder
        self._completion_logits = completion_logits
        self._autocast = autocast
        with quiet_stderr():
            base = AutoModelForCausalLM.from_pretrained(
                resolve_model(MODEL), dtype=getattr(torch, native_dtype()), attn_implementation="sdpa"
            )
            torch.nn.Module.to(base, DEVICE)
            super().__init__(PeftModel.from_pretrained(base, str(adapter_folder), is_trainable=True), GRPOConfig())
        assert self.config.rollout.temperature == 1.0, "neither side divides the logits"
        self._note_loaded(self.model.parameters())

    def begin(self, case: Case) -> None:
        self._optimizer = None
        set_peft_model_state_dict(self.model, load_peft_weights(str(self._adapter_folder), device=DEVICE))
        self._optimizer = self.make_optimizer()
        groups = case.groups()
        rows = [group.prompt.token_ids + completion.token_ids for group in groups for completion in group.completions]
        advantages = [advantage for group in groups for advantage in group.advantages]
        self._ids_BT = torch.tensor(rows, device=DEVICE)
        self._batch = (self._ids_BT, case.completion_tokens, torch.tensor(advantages, device=DEVICE)[:, None])

    def step(self) -> None:
        """Forward, backward, clipping, AdamW."""
        assert self._optimizer is not None
        self.loss(*self._batch).backward()
        self.apply_gradients(self._optimizer)
        self._optimizer.zero_grad(set_to_none=True)

    def num_tokens(self) -> int:
        """Tokens that pass through the model in a step."""
        return self._ids_BT.numel()

    def probe(self, folder: Path) -> dict[str, Any]:
        """Loss, gradient norm, log-probabilities, and the cosine of the gradient with rankup's, which is in `folder`."""
        loss = self.loss(*self._batch)
        loss.backward()
        gradients = _gradients(self.model), load_file(folder / GRADIENTS_FILE, device=DEVICE)
        assert gradients[0].keys() == gradients[1].keys()
        names = sorted(gradients[0])
        stock, rankup = (torch.cat([found[name].flatten().double() for name in names]) for found in gradients)
        self.model.zero_grad(set_to_none=True)
        with torch.no_grad():
            logprobs_BR = self.logprobs(*self._batch[:2])
        return {
            "loss": loss.item(),
            "grad_norm": stock.norm().item(),
            "grad_cosine": torch.cosine_similarity(stock, rankup, dim=0).item(),
            "logprobs": logprobs_BR.flatten().tolist(),
        }

    def logprobs(self, ids_BT: torch.Tensor, completion: int) -> torch.Tensor:
        selected: dict[str, torch.Tensor] = {}
        if self._completion_logits:
            # Positions instead of their number: for a slice, torch's linear layer on CPU copies the head once per row.
            first = ids_BT.shape[1] - completion - 1
            selected["logits_to_keep"] = torch.arange(first, ids_BT.shape[1], device=DEVICE)
        attention_BT = torch.ones_like(ids_BT)
        with torch.autocast(DEVICE, dtype=torch.bfloat16, enabled=self._autocast):
            logits_BTV = self.model(input_ids=ids_BT, attention_mask=attention_BT, use_cache=False, **selected).logits
        return logprobs_of(logits_BTV, ids_BT)[:, -completion:]


def _gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}


def _synchronize() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()
