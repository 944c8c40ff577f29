"""Rank, scale and learning rate in reinforcement learning: the defaults, their reasons, and a configuration compared with
them.

An adapter adds `s B A` to a weight, s = alpha / rank, or alpha / sqrt(rank) with rsLoRA. Adam moves every entry of B by about
the learning rate, whatever the gradient's size. From B = 0 the first steps therefore change the layer's output for an input x
by

    s dB (A x)   of size   s * rate * sum over the rank of |A x|   ~   s * rank * rate

so `s * rank * rate`, the *effective step*, is what one learning rate must be compared by. With alpha / rank it is `alpha *
rate` at every rank: with alpha = 32 one rate serves all ranks. With alpha = rank, alpha = 2 rank or rsLoRA it grows with the
rank: the same rate is up to 45 times the step (rank 128, rsLoRA, alpha 128).

At one rank the comparison is exact for B: a scale k times as large with 1/k of B's rate is the same run, since `s B` then
takes the same values and A sees the same gradients (as long as gradients are not clipped: their norm counts B's gradients,
which are k times as large). That is what `optim.rescale_learning_rate` does; A keeps its rate.

Defaults for RL: rank 64 (to 128), alpha 32, no rsLoRA, dropout 0, weight decay 0, Adam (0.9, 0.95), clip 1, constant rate
without warm-up (B = 0 is a gentle start). `docs/defaults.md` has the evidence.
"""

from __future__ import annotations

from ..config import GRPOConfig, LoraConfig, OptimConfig

REFERENCE_ALPHA = 32.0
REFERENCE_RATE = 1e-4
FAR_ABOVE, FAR_BELOW = 4.0, 1 / 40  # RL runs at alpha 32 use 5e-6 to 1e-4; the quick start twice that, falling to 0

EMBEDDING_RATE = 5e-5


def effective_alpha(scaling: float, rank: int) -> float:
    """The alpha that gives, divided by the rank, this scale: `s * rank`. The effective step is this times the rate."""
    return scaling * rank


def step_factor(lora: LoraConfig, optim: OptimConfig) -> float:
    """How many times the reference's (alpha 32, rate 1e-4) the configuration's effective step is, at its peak."""
    reference = REFERENCE_ALPHA * REFERENCE_RATE
    rate = optim.learning_rate * optim.lora_plus_ratio
    alpha = REFERENCE_ALPHA if optim.rescale_learning_rate else effective_alpha(lora.scaling, lora.rank)
    return alpha * rate / reference


def equivalent_rate(lora: LoraConfig, optim: OptimConfig) -> float:
    """The learning rate that makes, at this rank and scale, the step that `optim.learning_rate` makes at alpha 32."""
    return optim.learning_rate * REFERENCE_ALPHA / effective_alpha(lora.scaling, lora.rank)


def rate_factor(role: str, *, scaling: float, rank: int, optim: OptimConfig) -> float:
    """The factor of the scheduled learning rate for a master weight.

    role: `a`, `b` (LoRA+'s ratio, arXiv 2402.12354, and the scale's part if asked for), or `embedding` (its own rate).
    """
    if role == "embedding":
        own_rate = optim.embedding_learning_rate
        return (min(EMBEDDING_RATE, optim.learning_rate) if own_rate is None else own_rate) / optim.learning_rate
    if role == "a":
        return 1.0
    rescaled = REFERENCE_ALPHA / effective_alpha(scaling, rank) if optim.rescale_learning_rate else 1.0
    return optim.lora_plus_ratio * rescaled


def describe(config: GRPOConfig) -> list[str]:
    """Notes at the start of a run: rank, scale and step, and a warning where the step is far from the reference."""
    lora, optim = config.lora, config.optim
    formula = "alpha/sqrt(rank)" if lora.use_rslora else "alpha/rank"
    factor = step_factor(lora, optim)
    lines = [
        f"adapter: rank {lora.rank}, scale {lora.scaling:.3g} ({formula}, alpha {lora.alpha:g}), "
        f"learning rate {optim.learning_rate:g}: {factor:.3g} times the reference step (alpha 32, 1e-4)"
    ]
    if lora.rank_pattern or lora.alpha_pattern:
        lines[0] += "; layers in rank_pattern or alpha_pattern have their own"
    if FAR_BELOW <= factor <= FAR_ABOVE:
        return lines
    much = "above" if factor > FAR_ABOVE else "below"
    rate = optim.learning_rate / factor
    advice = f"optim.learning_rate={rate:.2g} gives the reference step"
    if not optim.rescale_learning_rate and effective_alpha(lora.scaling, lora.rank) != REFERENCE_ALPHA:
        advice += (
            f", and {equivalent_rate(lora, optim):.2g} the step that {optim.learning_rate:g} has at alpha 32 "
            "(optim.rescale_learning_rate=true scales the rate of B so)"
        )
    return [*lines, f"the step is far {much} the usual one in RL ({factor:.3g} times the reference): {advice}"]
