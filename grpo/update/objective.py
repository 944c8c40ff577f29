"""The configured objective: from a pack to the loss that `linear_logprob_loss` differentiates.

    objective = Objective(config)
    loss = objective.of(pack, constants, old_logprobs_N=None, reference_logprobs_N=None)
    policy.backward(pack, loss.token_loss, passes=loss.passes, factor=loss.factor)

If a token's loss depends on that token alone, one pass over the logits computes it. A ratio of complete sequences needs their
log-probabilities first, which takes two passes. A veto or an off-policy mask only switches a completion off: it is a factor of
each token's gradient, applied once all log-probabilities are known, and needs no second pass.

Legend: N tokens of a pack, n those of a chunk, S completions of the pack.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from ..algorithm.corrections import correction_weights, veto_keep
from ..algorithm.losses import (
    Counts,
    LossInputs,
    UserLoss,
    cispo,
    clipped_surrogate,
    kl_k3,
    off_policy_keep,
    sapo,
    sequence_ratio,
    token_weights,
)
from ..config import GRPOConfig
from ..config.functions import load_function, text_of

if TYPE_CHECKING:
    from ...kernels.logprob import TokenFactor, TokenLoss
    from ..model.packing import Pack


@dataclass(frozen=True, slots=True, kw_only=True)
class PackLoss:
    """The loss of one pack: the arguments of `linear_logprob_loss`."""

    token_loss: TokenLoss
    factor: TokenFactor | None
    passes: Literal[1, 2]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepConstants:
    """Constants shared by the losses of a step's packs: the denominators of means, and the entropy that a token must reach.

    `entropy_tokens`: how many tokens reach it; the entropy bonus is a mean over them.
    """

    counts: Counts
    entropy_bound: torch.Tensor | None = None
    entropy_tokens: int


class Objective:
    """See the module's docstring.

    Raises:
        ValueError, FileNotFoundError: `algorithm.loss_type` names a function that cannot be loaded.
    """

    def __init__(self, config: GRPOConfig) -> None:
        self.algorithm = config.algorithm
        self.correction = config.correction
        self._user_loss: UserLoss | None = None
        if self.algorithm.custom_loss is not None:
            self._user_loss = load_function("algorithm.loss_type", self.algorithm.custom_loss)
        self._sequence_level = (
            self.algorithm.importance_sampling_level == "sequence"
            or self.correction.mode.startswith("sequence")
            or self._user_loss is not None
        )
        self._switches_off = self.correction.veto > 0 or self.algorithm.off_policy_mask_threshold is not None
        # A KL penalty or entropy bonus also applies to completions that are switched off, so one factor cannot serve both.
        needs_both_terms = self._switches_off and self.algorithm.needs_every_group
        self._passes: Literal[1, 2] = 2 if self._sequence_level or needs_both_terms else 1

    def of(
        self,
        pack: Pack,
        constants: StepConstants,
        *,
        old_logprobs_N: torch.Tensor | None,
        reference_logprobs_N: torch.Tensor | None,
    ) -> PackLoss:
        """The loss of one pack.

        Args:
            old_logprobs_N: None if the policy is still that of the start of the step; the ratio is then exactly 1.
            reference_logprobs_N: required if `algorithm.beta` is above 0.
        """
        algorithm = self.algorithm
        assert (reference_logprobs_N is None) == (algorithm.beta == 0.0)
        weights_N = token_weights(algorithm.loss_aggregation, pack.lengths_S, constants.counts)[pack.sequence_N]

        def loss(logprobs_n: torch.Tensor, entropy_n: torch.Tensor, chunk: slice) -> torch.Tensor:
            old_n = logprobs_n.detach() if old_logprobs_N is None else old_logprobs_N[chunk]
            tokens = _tokens(pack, chunk, logprobs_n, entropy_n, old_n)
            loss_n = self._policy_loss(tokens)
            active_n = None if constants.entropy_bound is None else entropy_n.detach() >= constants.entropy_bound
            if active_n is not None:
                loss_n = loss_n * active_n
            if self._passes == 2 and self._switches_off:
                loss_n = loss_n * self._keep(tokens)
            if reference_logprobs_N is not None:
                kl_n = kl_k3(logprobs_n, reference_logprobs_N[chunk])
                if algorithm.use_bias_correction_kl:
                    kl_n = kl_n * self._ratio(logprobs_n - old_n, tokens.lengths)
                loss_n = loss_n + algorithm.beta * kl_n
            loss_n = loss_n * weights_N[chunk]
            if algorithm.entropy_coef != 0:
                bonus_n = entropy_n if active_n is None else entropy_n * active_n
                loss_n = loss_n - (algorithm.entropy_coef / constants.entropy_tokens) * bonus_n
            return loss_n

        def factor(logprobs_N: torch.Tensor, entropy_N: torch.Tensor) -> torch.Tensor:
            old_N = logprobs_N if old_logprobs_N is None else old_logprobs_N
            return self._keep(_tokens(pack, slice(None), logprobs_N, entropy_N, old_N)).to(logprobs_N.dtype)

        return PackLoss(
            token_loss=loss, factor=factor if self._switches_off and self._passes == 1 else None, passes=self._passes
        )

    def weights(self, pack: Pack, old_logprobs_N: torch.Tensor) -> torch.Tensor:
        """The correction's factor of each token's loss [N], vetoes included."""
        log_w_N = old_logprobs_N - pack.sampler_logprobs_N
        weights_N = correction_weights(log_w_N, pack.lengths_S, self.correction)
        if self.correction.veto > 0:
            weights_N = weights_N * veto_keep(log_w_N, pack.lengths_S, veto=self.correction.veto)
        return weights_N

    def keeps(self, pack: Pack, logprobs_N: torch.Tensor) -> torch.Tensor:
        """[N], False for tokens of completions that are vetoed or masked under the policy at the start of the step."""
        return self._keep(_tokens(pack, slice(None), logprobs_N, logprobs_N, logprobs_N))

    def clip_counts(self, pack: Pack, logprobs_N: torch.Tensor, old_logprobs_N: torch.Tensor) -> torch.Tensor:
        """How many of the pack's tokens are clipped below and above, [2]. A user-supplied objective has no clip."""
        ratio_N, algorithm = self._ratio(logprobs_N - old_logprobs_N, pack.lengths_S), self.algorithm
        if algorithm.loss_type == "sapo" or self._user_loss is not None:
            return logprobs_N.new_zeros(2)  # same device as the sums
        high = algorithm.epsilon_high if algorithm.loss_type == "cispo" else 1.0 + algorithm.epsilon_high
        low = 0.0 if algorithm.loss_type == "cispo" else 1.0 - algorithm.epsilon
        below_N = (ratio_N < low) & (pack.advantages_N < 0)
        above_N = (ratio_N > high) & (pack.advantages_N > 0)
        return torch.stack([below_N.sum(), above_N.sum()]).float()

    def _policy_loss(self, tokens: LossInputs) -> torch.Tensor:
        """The surrogate of each token times the correction's weight, [n]."""
        if self._user_loss is not None:
            loss_n = self._user_loss(tokens)
            if not isinstance(loss_n, torch.Tensor) or loss_n.shape != tokens.logprobs.shape:
                raise ValueError(
                    f"{text_of(self._user_loss)} must return one loss for each token: a tensor of shape "
                    f"{list(tokens.logprobs.shape)}"
                )
        else:
            loss_n = self._surrogate(tokens)
        if self.correction.mode != "none":
            # The weight corrects the policy of the start of the step; what changed since is in the ratio.
            log_w_n = tokens.old_logprobs - tokens.sampler_logprobs
            lengths_S = tokens.lengths if self._sequence_level else None
            loss_n = loss_n * correction_weights(log_w_n, lengths_S, self.correction)
        return loss_n

    def _surrogate(self, tokens: LossInputs) -> torch.Tensor:
        algorithm = self.algorithm
        ratio_n = self._ratio(tokens.logprobs - tokens.old_logprobs, tokens.lengths)
        if algorithm.loss_type == "cispo":
            return cispo(tokens.logprobs, ratio_n, tokens.advantages, cap=algorithm.epsilon_high)
        if algorithm.loss_type == "sapo":
            return sapo(
                ratio_n,
                tokens.advantages,
                positive=algorithm.sapo_temperature_pos,
                negative=algorithm.sapo_temperature_neg,
            )
        return clipped_surrogate(
            ratio_n,
            tokens.advantages,
            epsilon=algorithm.epsilon,
            epsilon_high=algorithm.epsilon_high,
            delta=algorithm.delta,
        )

    def _ratio(self, log_ratio_n: torch.Tensor, lengths_S: torch.Tensor) -> torch.Tensor:
        if self.algorithm.importance_sampling_level == "sequence":
            return sequence_ratio(log_ratio_n, lengths_S)
        return torch.exp(log_ratio_n)

    def _keep(self, tokens: LossInputs) -> torch.Tensor:
        """[n], False for tokens of completions that are switched off."""
        keep_n = torch.ones_like(tokens.logprobs, dtype=torch.bool)
        if self.correction.veto > 0:
            log_w_n = tokens.old_logprobs - tokens.sampler_logprobs
            keep_n &= veto_keep(log_w_n, tokens.lengths, veto=self.correction.veto)
        if self.algorithm.off_policy_mask_threshold is not None:
            keep_n &= off_policy_keep(
                tokens.logprobs.detach(),
                tokens.sampler_logprobs,
                tokens.advantages,
                tokens.lengths,
                threshold=self.algorithm.off_policy_mask_threshold,
            )
        return keep_n


def _tokens(
    pack: Pack, chunk: slice, logprobs_n: torch.Tensor, entropy_n: torch.Tensor, old_n: torch.Tensor
) -> LossInputs:
    return LossInputs(
        logprobs=logprobs_n,
        entropies=entropy_n,
        old_logprobs=old_n,
        sampler_logprobs=pack.sampler_logprobs_N[chunk],
        advantages=pack.advantages_N[chunk],
        sequence=pack.sequence_N[chunk],
        lengths=pack.lengths_S,
    )
