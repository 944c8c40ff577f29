"""A GRPO update by stock transformers and PEFT, for the benchmarks of time and of memory.

Legend: B rows (completions), R tokens of each completion, T tokens of a row, V vocabulary.
"""

from __future__ import annotations

import torch
from peft import PeftMixedModel, PeftModel

from rankup.grpo.algorithm.losses import clipped_surrogate
from rankup.grpo.config import GRPOConfig


class PeftSide:
    """The model, and the objective, clipping and AdamW of a configuration. A subclass computes the log-probabilities.

    A batch has one row per completion, its prompt first; all prompts have one length, and so have all completions.
    """

    def __init__(self, model: PeftModel | PeftMixedModel, config: GRPOConfig) -> None:
        self.model, self.config = model, config
        self.model.train()
        self.trained = [p for p in model.parameters() if p.requires_grad]
        assert {p.dtype for p in self.trained} == {torch.float32}, "PEFT's default"

    def make_optimizer(self) -> torch.optim.AdamW:
        optim = self.config.optim
        return torch.optim.AdamW(
            self.trained,
            lr=optim.learning_rate,
            betas=(optim.adam_beta1, optim.adam_beta2),
            eps=optim.adam_epsilon,
            weight_decay=optim.weight_decay,
            fused=True,
        )

    def logprobs(self, ids_BT: torch.Tensor, completion: int) -> torch.Tensor:
        """Log-probabilities [B, R] of the last `completion` tokens of each row."""
        raise NotImplementedError

    def loss(self, ids_BT: torch.Tensor, completion: int, advantages_B1: torch.Tensor) -> torch.Tensor:
        """DAPO's loss: the mean over all completion tokens. On-policy, so the old log-probabilities are the current ones."""
        algorithm = self.config.algorithm
        logprobs_BR = self.logprobs(ids_BT, completion)
        ratio_BR = torch.exp(logprobs_BR - logprobs_BR.detach())
        loss_BR = clipped_surrogate(ratio_BR, advantages_B1, epsilon=algorithm.epsilon, epsilon_high=algorithm.epsilon_high)
        return loss_BR.mean()

    def apply_gradients(self, optimizer: torch.optim.Optimizer) -> None:
        """Clipping and AdamW."""
        torch.nn.utils.clip_grad_norm_(self.trained, self.config.optim.max_grad_norm)
        optimizer.step()


def logprobs_of(logits_BTV: torch.Tensor, ids_BT: torch.Tensor) -> torch.Tensor:
    """Log-probabilities in fp32 of the tokens that the logits predict: all but the first of as many tokens."""
    targets_BT = ids_BT[:, 1 - logits_BTV.shape[1] :]
    return logits_BTV[:, :-1].float().log_softmax(-1).gather(-1, targets_BT[..., None])[..., 0]
