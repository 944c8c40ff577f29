"""What `memory.py` measures: an update by rankup, by PEFT with full logits, and by PEFT with TRL's chunked head.

    side = SIDES["rankup"](folder, rank=64, gradient_checkpointing=True)
    side.add_gradients(Group(prompt=512, completion=1536, generations=8))       # a pass: forward and backward
    side.apply_gradients()                                                      # clipping and AdamW; they stay

All sides have the same base in bf16, the same fp32 adapters on all seven projections, the same group in a pass, and the same
rule for gradient checkpointing. On fake tensors nothing has a value.

Legend: B rows (completions), R tokens of each, T tokens of a row, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast
from unittest import mock

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import get_peft_model
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from trl.kernels.chunked_logprob import ChunkedLogProbFunction
from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE

from rankup.grpo.algorithm.losses import clipped_surrogate
from rankup.grpo.cli.plan.step_memory import backward_pass, make_pack
from rankup.grpo.config import GRPOConfig
from rankup.grpo.model.base_model import load_base
from rankup.grpo.model.policy import LOGITS_MIB, Policy
from rankup.grpo.update.optimizer import make_optimizer

ALPHA = 32
UNMASKED = "sdpa_without_a_mask"


@dataclass(frozen=True, slots=True)
class Group:
    """One prompt and its completions, in tokens."""

    prompt: int
    completion: int
    generations: int

    @property
    def shared_tokens(self) -> int:
        """That go through the model with the prompt once: P + G (R - 1), since nothing follows a completion's last token."""
        return self.prompt + self.generations * (self.completion - 1)

    @property
    def plain_tokens(self) -> int:
        """The same with the prompt in front of every completion."""
        return self.generations * (self.prompt + self.completion - 1)


SMALLEST = Group(prompt=2, completion=2, generations=2)


class RankupSide:
    """rankup's policy, objective and optimizer. Judgements of a `Learner` about numbers are left out: they have no values."""

    def __init__(self, folder: Path, *, rank: int, gradient_checkpointing: bool, logits_mib: int = LOGITS_MIB["cuda"]) -> None:
        self._config = GRPOConfig(lora={"rank": rank, "alpha": ALPHA})
        self._policy = Policy(
            str(folder), lora=self._config.lora, gradient_checkpointing=gradient_checkpointing, logits_mib=logits_mib
        )
        self._optimizer = make_optimizer(self._policy.master_roles, self._config.optim)

    @property
    def fusion(self) -> str:
        """Which modules compute together."""
        return self._policy.fusion.summary

    def add_gradients(self, group: Group) -> None:
        """One pack of the group."""
        sizes = [(group.prompt, [group.completion] * group.generations)]
        backward_pass(self._policy, make_pack(self._policy, sizes, tokens_per_pack=group.shared_tokens), self._config)

    def apply_gradients(self) -> None:
        """And publish: the slots follow the master weights."""
        _step(self._optimizer, self._policy.masters, self._config)
        self._policy.write_slots()

    def forget_gradients(self) -> None:
        """As at the end of an update."""
        self._optimizer.zero_grad(set_to_none=True)


class PeftSide:
    """transformers and PEFT: one row a completion, no padding, bf16 autocast as by transformers' Trainer with `bf16=True`.

    Attention is torch's, by its flash kernel. Where rows have no padding transformers leaves out the mask, as it can see from
    values only; without values it would make one of T x T, so it gets the argument explicitly.
    """

    def __init__(self, folder: Path, *, rank: int, gradient_checkpointing: bool) -> None:
        self._config = GRPOConfig(lora={"rank": rank, "alpha": ALPHA})
        AttentionInterface.register(UNMASKED, sdpa_attention_forward)
        AttentionMaskInterface.register(UNMASKED, lambda *args, **kwargs: None)
        base = load_base(str(folder), dtype=torch.bfloat16).model
        base.set_attn_implementation(UNMASKED)
        if gradient_checkpointing:
            base.gradient_checkpointing_enable()
        targets = list(self._config.lora.target_modules)
        lora = PeftLoraConfig(r=rank, lora_alpha=ALPHA, target_modules=targets, task_type="CAUSAL_LM")
        self._base, self._model = base, get_peft_model(base, lora)
        self._model.train()
        self._trained = [p for p in self._model.parameters() if p.requires_grad]
        assert {p.dtype for p in self._trained} == {torch.float32}, "PEFT's default"
        optim = self._config.optim
        self._optimizer = torch.optim.AdamW(self._trained, lr=optim.learning_rate, fused=True)

    def add_gradients(self, group: Group) -> None:
        """One batch of the group."""
        ids_BT = torch.zeros(group.generations, group.prompt + group.completion, dtype=torch.long)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logprobs_BR = self._logprobs(ids_BT, group.completion)
        algorithm, advantages_B1 = self._config.algorithm, torch.zeros(group.generations, 1)
        ratio_BR = torch.exp(logprobs_BR - logprobs_BR.detach())
        loss_BR = clipped_surrogate(ratio_BR, advantages_B1, epsilon=algorithm.epsilon, epsilon_high=algorithm.epsilon_high)
        loss_BR.mean().backward()

    def apply_gradients(self) -> None:
        _step(self._optimizer, self._trained, self._config)

    def forget_gradients(self) -> None:
        self._optimizer.zero_grad(set_to_none=True)

    def _logprobs(self, ids_BT: torch.Tensor, completion: int) -> torch.Tensor:
        """Of the completions' tokens [B, R], by logits of these positions only and torch's log-softmax in fp32."""
        logits_BRV = self._model(input_ids=ids_BT, use_cache=False, logits_to_keep=completion + 1).logits[:, :-1]
        return logits_BRV.float().log_softmax(-1).gather(-1, ids_BT[:, -completion:, None])[..., 0]


class TrlSide(PeftSide):
    """The same with the head of TRL 1.16's GRPOTrainer: `trl.trainer.utils.add_fused_lm_head`, which hands the hidden states
    of scored positions to `trl.kernels.chunked_logprob.ChunkedLogProbFunction`. That function is called here as it calls it;
    which positions are scored it reads off labels' values, so this is done here."""

    def _logprobs(self, ids_BT: torch.Tensor, completion: int) -> torch.Tensor:
        hidden_BTD = self._base.base_model(input_ids=ids_BT, use_cache=False).last_hidden_state[:, :-1]
        hidden_ND = hidden_BTD[:, -completion:].flatten(0, 1)
        head = cast(torch.nn.Linear, self._base.get_output_embeddings())
        targets_N = ids_BT[:, -completion:].flatten()
        chunked = cast(Callable[..., Any], ChunkedLogProbFunction.apply)
        outputs = chunked(
            hidden_ND, head.weight, None, targets_N, 1.0, _CHUNKED_LOGPROB_CHUNK_SIZE, None, 1.0, ("log_probs", "entropy")
        )
        return outputs[0].view(-1, completion)


@contextmanager
def trls_paths_of_cuda() -> Iterator[None]:
    """Let TRL choose as with bf16 on a CUDA device."""
    with (
        mock.patch("trl.kernels.chunked_logprob._use_triton", lambda *tensors: True),
        # On CUDA a product of bf16 is summed up in fp32 in place; elsewhere TRL makes fp32 copies first.
        mock.patch("trl.kernels.chunked_logprob._addmm_fp32", lambda total, left, right: None),
    ):
        yield


SIDES: dict[str, type[RankupSide] | type[PeftSide]] = {"rankup": RankupSide, "trl": TrlSide, "peft": PeftSide}


def _step(optimizer: torch.optim.Optimizer, trained: list[torch.nn.Parameter], config: GRPOConfig) -> None:
    """Gradients are clipped, which nothing decides without values, and applied."""
    norm = torch.nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None])
    torch.nn.utils.clip_grads_with_norm_(trained, config.optim.max_grad_norm, norm)
    optimizer.step()
