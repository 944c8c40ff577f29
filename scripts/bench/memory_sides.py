"""What `memory.py` measures: an update by rankup, by PEFT with full logits, and by PEFT with TRL's chunked head.

    side = SIDES["rankup"](folder, rank=64, gradient_checkpointing=True)
    side.add_gradients(Case(512, 1536, prompts=1, completions=8))               # a pass: forward and backward
    side.update()                                                               # clipping and AdamW; the gradients stay

All sides have the same base in bf16, the same fp32 adapters on all seven projections, the same group in a pass, and the same
rule for gradient checkpointing. On fake tensors nothing has a value.

Legend: B rows (completions), R tokens of each, T tokens of a row, D hidden, V vocabulary, N scored tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast
from unittest import mock

import torch
from cases import Case
from peft import LoraConfig as PeftLoraConfig
from peft import get_peft_model
from peft_side import PeftSide, logprobs_of
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from trl.kernels.chunked_logprob import ChunkedLogProbFunction
from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE

from rankup.grpo.config import GRPOConfig
from rankup.grpo.memory.step_memory import backward_pass, make_pack
from rankup.grpo.model.base_model import load_base
from rankup.grpo.model.policy import LOGITS_MIB, Policy
from rankup.grpo.model.targets import find_targets
from rankup.grpo.update.optimizer import make_optimizer

ALPHA = 32
UNMASKED = "sdpa_without_a_mask"


class RankupSide:
    """rankup's policy, objective and optimizer. Judgements of a `Learner` about numbers are left out: they have no values."""

    def __init__(self, folder: Path, *, rank: int, gradient_checkpointing: bool) -> None:
        self._config = GRPOConfig(lora={"rank": rank, "alpha": ALPHA})
        self.policy = Policy(
            str(folder),
            lora=self._config.lora,
            gradient_checkpointing=gradient_checkpointing,
            logits_mib=LOGITS_MIB["cuda"],
        )
        self.optimizer = make_optimizer(self.policy.master_roles, self._config.optim)

    def add_gradients(self, case: Case) -> None:
        """One pack of the group."""
        sizes = [(case.prompt_tokens, [case.completion_tokens] * case.completions)]
        backward_pass(self.policy, make_pack(self.policy, sizes, tokens_per_pack=case.tokens), self._config)

    def update(self) -> None:
        """And publish: the slots follow the master weights."""
        torch.nn.utils.clip_grad_norm_(self.policy.masters, self._config.optim.max_grad_norm)
        self.optimizer.step()
        self.policy.write_slots()


class FullLogitsSide(PeftSide):
    """transformers and PEFT: no padding, bf16 autocast as by transformers' Trainer with `bf16=True`.

    Attention is torch's, by its flash kernel. Where rows have no padding transformers leaves out the mask, as it can see from
    values only; without values it would make one of T x T, so it gets the argument explicitly.
    """

    def __init__(self, folder: Path, *, rank: int, gradient_checkpointing: bool) -> None:
        config = GRPOConfig(lora={"rank": rank, "alpha": ALPHA})
        AttentionInterface.register(UNMASKED, sdpa_attention_forward)
        AttentionMaskInterface.register(UNMASKED, lambda *args, **kwargs: None)
        self.base = load_base(str(folder), dtype=torch.bfloat16).model
        self.base.set_attn_implementation(UNMASKED)
        if gradient_checkpointing:
            self.base.gradient_checkpointing_enable()
        targets = find_targets(self.base, config.lora.targets).names
        lora = PeftLoraConfig(r=rank, lora_alpha=ALPHA, target_modules=targets, task_type="CAUSAL_LM")
        super().__init__(get_peft_model(self.base, lora), config)
        self.optimizer = self.make_optimizer()

    def add_gradients(self, case: Case) -> None:
        """One batch of the group."""
        ids_BT = torch.zeros(case.completions, case.prompt_tokens + case.completion_tokens, dtype=torch.long)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = self.loss(ids_BT, case.completion_tokens, torch.zeros(case.completions, 1))
        loss.backward()

    def update(self) -> None:
        self.apply_gradients(self.optimizer)

    def logprobs(self, ids_BT: torch.Tensor, completion: int) -> torch.Tensor:
        """By logits of these positions only."""
        return logprobs_of(self.model(input_ids=ids_BT, use_cache=False, logits_to_keep=completion + 1).logits, ids_BT)


class TrlSide(FullLogitsSide):
    """The same with the head of TRL 1.16's GRPOTrainer: `trl.trainer.utils.add_fused_lm_head`, which hands the hidden states
    of scored positions to `trl.kernels.chunked_logprob.ChunkedLogProbFunction`. That function is called here as it calls it;
    which positions are scored it reads off labels' values, so this is done here."""

    def logprobs(self, ids_BT: torch.Tensor, completion: int) -> torch.Tensor:
        hidden_BTD = self.base.base_model(input_ids=ids_BT, use_cache=False).last_hidden_state[:, :-1]
        hidden_ND = hidden_BTD[:, -completion:].flatten(0, 1)
        head = cast(torch.nn.Linear, self.base.get_output_embeddings())
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


SIDES: dict[str, type[RankupSide] | type[FullLogitsSide]] = {"rankup": RankupSide, "trl": TrlSide, "peft": FullLogitsSide}
