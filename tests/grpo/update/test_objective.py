"""The configured objective: passes over the logits, user-supplied functions, and independence of packs and chunks."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from sample_groups import loss_on_leaves, random_groups, with_logprobs

from rankup.grpo.algorithm.losses import Counts, entropy_bound, token_weights
from rankup.grpo.config import GRPOConfig, load_config
from rankup.grpo.config.algorithm import OBJECTIVES
from rankup.grpo.data.groups import Group
from rankup.grpo.model.packing import Pack, by_completion, pack
from rankup.grpo.model.policy import Policy
from rankup.grpo.update.objective import Objective, StepConstants

SHAPES = [(4, [3, 1, 6, 2]), (2, [7, 4])]
NO_CORRECTION = {"mode": "none", "veto": 0.0}


@pytest.fixture
def one() -> Pack:
    (only,) = pack(random_groups(SHAPES), tokens_per_pack=1000)
    return only


def constants_of(packs: list[Pack], *, bound: torch.Tensor | None = None, reaching: int | None = None) -> StepConstants:
    """What the packs have in common; by default all their tokens reach the bound."""
    tokens = sum(len(one.targets_N) for one in packs)
    sequences = sum(len(one.lengths_S) for one in packs)
    counts = Counts(sequences=sequences, tokens=tokens, local_tokens=tokens, max_completion_length=30)
    return StepConstants(counts=counts, entropy_bound=bound, entropy_tokens=tokens if reaching is None else reaching)


def logprobs_near_the_sampler(one: Pack, width: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    noise_N = width * (torch.rand(len(one.targets_N), generator=generator) - 0.5)
    return (one.sampler_logprobs_N + noise_N).requires_grad_()


# --------------------------------------------------------------------------------------------- passes and factors


@pytest.mark.parametrize(
    ("options", "passes", "has_factor"),
    [
        (NO_CORRECTION, 1, False),
        ({"veto": 0.0, "mode": "icepop"}, 1, False),
        ({}, 1, True),  # the veto is on
        ({"veto": 0.0, "off_policy_mask_threshold": 0.1}, 1, True),
        ({**NO_CORRECTION, "beta": 0.1, "entropy_coef": 0.1, "top_entropy_quantile": 0.2}, 1, False),
        ({"beta": 0.1}, 2, False),  # the penalty still acts where the veto switches the rest off
        ({"off_policy_mask_threshold": 0.1, "entropy_coef": 0.1}, 2, False),
        ({**NO_CORRECTION, "importance_sampling_level": "sequence"}, 2, False),
        ({"veto": 0.0, "mode": "sequence_truncate"}, 2, False),
        ({"veto": 0.0, "mode": "sequence_mask"}, 2, False),
    ],
)
def test_two_passes_over_the_logits_only_where_a_token_depends_on_others(
    one: Pack, options: dict[str, Any], passes: int, has_factor: bool
) -> None:
    base_N = one.sampler_logprobs_N if "beta" in options else None
    loss = Objective(GRPOConfig(**options)).of(one, constants_of([one]), old_logprobs_N=None, reference_logprobs_N=base_N)
    assert (loss.passes, loss.factor is not None) == (passes, has_factor)


@pytest.mark.parametrize("loss_type", sorted(OBJECTIVES))
def test_only_gspo_takes_two_passes(one: Pack, loss_type: str) -> None:
    config = GRPOConfig(loss_type=loss_type, veto=0.0)
    loss = Objective(config).of(one, constants_of([one]), old_logprobs_N=None, reference_logprobs_N=None)
    assert loss.passes == (2 if loss_type == "gspo" else 1)


# --------------------------------------------------------------------------------- switched-off completions


@pytest.mark.parametrize("options", [{}, {"beta": 0.3}, {"mode": "sequence_truncate"}], ids=["once", "kl", "twice"])
def test_a_veto_takes_a_completion_out_of_the_policy_s_part(one: Pack, options: dict[str, Any]) -> None:
    """The third completion has a token that the trainer finds impossible; the penalty stays, as do all other gradients."""
    vetoed_N = one.sequence_N == 2
    logprobs_N = logprobs_near_the_sampler(one).detach()
    logprobs_N[int(vetoed_N.nonzero()[1])] -= 10.0  # w = e^-10, below 1e-4
    logprobs_N.requires_grad_()
    gradients = []
    for veto in (1e-4, 0.0):
        objective = Objective(GRPOConfig(veto=veto, **options))
        base_N = one.sampler_logprobs_N if "beta" in options else None
        loss = objective.of(one, constants_of([one]), old_logprobs_N=None, reference_logprobs_N=base_N)
        gradients += torch.autograd.grad(loss_on_leaves(loss, logprobs_N, torch.ones_like(logprobs_N)), logprobs_N)
    with_veto_N, without_N = gradients
    assert torch.equal(with_veto_N[~vetoed_N], without_N[~vetoed_N])
    kl_slope_N = options.get("beta", 0.0) * (1 - torch.exp(one.sampler_logprobs_N - logprobs_N.detach())) / len(logprobs_N)
    torch.testing.assert_close(with_veto_N[vetoed_N], kl_slope_N[vetoed_N])
    assert not torch.allclose(without_N[vetoed_N], kl_slope_N[vetoed_N])


def test_the_reported_weights_are_those_of_the_loss(one: Pack) -> None:
    old_N = logprobs_near_the_sampler(one, width=3.0).detach()
    old_N[4] -= 10.0
    objective = Objective(GRPOConfig(mode="token_mask", cap=1.5))
    loss = objective.of(one, constants_of([one]), old_logprobs_N=old_N, reference_logprobs_N=None)
    logprobs_N = old_N.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss_on_leaves(loss, logprobs_N, torch.ones_like(old_N)), logprobs_N)
    weights_N = objective.weights(one, old_N)
    torch.testing.assert_close(gradient, -one.advantages_N * weights_N / len(old_N))
    assert 0 < int((weights_N == 0).sum()) < len(weights_N)
    assert not weights_N[one.sequence_N == one.sequence_N[4]].any(), "the veto is among them"


# --------------------------------------------------------------------------------------- user-supplied functions


@pytest.fixture
def custom(tmp_path: Path) -> Callable[..., Objective]:
    """The objective of a run file whose `loss_type` is the function `mine` of a file next to it."""

    def objective(body: str, **options: Any) -> Objective:
        (tmp_path / "losses.py").write_text(f"import torch\n\n\n{body}\n", encoding="utf-8")
        (tmp_path / "run.yaml").write_text("algorithm: {loss_type: 'losses.py:mine'}\n", encoding="utf-8")
        overrides = [f"{name}={value}" for name, value in ({"mode": "none", "veto": 0.0} | options).items()]
        return Objective(load_config(tmp_path / "run.yaml", overrides))

    return objective


def gradient_of(objective: Objective, one: Pack, old_N: torch.Tensor | None = None) -> torch.Tensor:
    logprobs_N = logprobs_near_the_sampler(one)
    loss = objective.of(one, constants_of([one]), old_logprobs_N=old_N, reference_logprobs_N=None)
    assert loss.passes == 2, "it may depend on complete completions"
    return torch.autograd.grad(loss_on_leaves(loss, logprobs_N, torch.ones_like(logprobs_N)), logprobs_N)[0]


def test_a_user_supplied_objective_from_a_file_next_to_the_run_file(custom: Callable[..., Objective], one: Pack) -> None:
    objective = custom("def mine(tokens):\n    return -tokens.advantages * tokens.logprobs", loss_aggregation="sequence_mean")
    weights_N = token_weights("sequence_mean", one.lengths_S, constants_of([one]).counts)[one.sequence_N]
    torch.testing.assert_close(gradient_of(objective, one), -one.advantages_N * weights_N)
    assert objective.clip_counts(one, one.sampler_logprobs_N, one.sampler_logprobs_N).tolist() == [0.0, 0.0]


CUSTOM_GSPO = """
def mine(tokens):
    log_ratio = tokens.logprobs - tokens.old_logprobs
    sums = torch.zeros(len(tokens.lengths)).index_add(0, tokens.sequence, log_ratio)
    ratio = torch.exp(sums / tokens.lengths)[tokens.sequence]
    clipped = ratio.clamp(1 - 3e-4, 1 + 4e-4)
    return -torch.minimum(ratio * tokens.advantages, clipped * tokens.advantages)
"""


def test_a_user_supplied_objective_sees_complete_completions(custom: Callable[..., Objective], one: Pack) -> None:
    """GSPO as somebody else would write it, with the corrections that all objectives get."""
    correction = {"mode": "sequence_truncate", "veto": 0.01}
    objective = custom(CUSTOM_GSPO, loss_aggregation="sequence_mean", **correction)
    old_N = logprobs_near_the_sampler(one).detach() + 1e-3 * torch.sin(torch.arange(len(one.targets_N)))
    expected = gradient_of(Objective(GRPOConfig(loss_type="gspo", **correction)), one, old_N)
    assert expected.any()
    torch.testing.assert_close(gradient_of(objective, one, old_N), expected)


@pytest.mark.parametrize(
    "result", ["(tokens.logprobs * tokens.advantages).mean()", "tokens.logprobs[:-1]", "0.0", "tokens.logprobs[:, None]"]
)
def test_a_wrong_result_of_an_objective_is_an_error(custom: Callable[..., Objective], one: Pack, result: str) -> None:
    with pytest.raises(ValueError, match=r"losses.py:mine must return one loss for each token: a tensor of shape \[23\]"):
        gradient_of(custom(f"def mine(tokens):\n    return {result}"), one)


def test_an_object_that_is_not_a_function_is_an_error(custom: Callable[..., Objective]) -> None:
    with pytest.raises(ValueError, match=r"algorithm.loss_type: .*losses.py:mine is not a function"):
        custom("mine = 3")
    with pytest.raises(ValueError, match=r"losses.py has no 'mine': did you mean mime\?"):
        custom("def mime(tokens):\n    return tokens.logprobs")
    with pytest.raises(FileNotFoundError, match=r"no file nowhere/losses.py"):
        Objective(GRPOConfig(loss_type="nowhere/losses.py:mine"))


# ------------------------------------------------------------------------------------------------ packs and chunks

STEP_SHAPES = [(7, [5, 1, 9, 4]), (1, [3, 6]), (12, [8, 2]), (3, [10])]
CASES = {
    **{loss_type: {"loss_type": loss_type} for loss_type in sorted(OBJECTIVES)},
    "quantile": {"top_entropy_quantile": 0.3},
    "entropy": {"entropy_coef": 0.3},
    "quantile and entropy, without a veto": {"top_entropy_quantile": 0.3, "entropy_coef": 0.3, "veto": 0.0},
    "token_mask": {"mode": "token_mask", "cap": 1.2},
    "sequence_truncate": {"mode": "sequence_truncate", "cap": 1.05},
    "sequence_mask": {"mode": "sequence_mask", "cap": 1.05},
    "veto": {"veto": 0.7},
    "veto and kl": {"veto": 0.7, "beta": 0.3},
    "off-policy mask": {"off_policy_mask_threshold": 0.02},
    "everything": {
        "loss_type": "gspo",
        "epsilon": 0.1,
        "epsilon_high": 0.1,
        "delta": 1.2,
        "beta": 0.3,
        "entropy_coef": 0.3,
        "top_entropy_quantile": 0.5,
        "mode": "sequence_truncate",
        "cap": 1.05,
        "veto": 0.7,
        "off_policy_mask_threshold": 0.02,
    },
}


def near_the_policy(policy: Policy) -> list[Group]:
    """Groups whose sampler's log-probabilities are the policy's but for noise."""
    groups = random_groups(STEP_SHAPES)
    packs = pack(groups, tokens_per_pack=1000)
    exact = by_completion(packs, [policy.logprobs(one)[0] for one in packs])
    generator = torch.Generator().manual_seed(0)
    return with_logprobs(groups, [lps + 0.8 * (torch.rand(lps.shape, generator=generator) - 0.5) for lps in exact])


def loss_and_gradients(policy: Policy, packs: list[Pack], config: GRPOConfig, *, off_policy: bool) -> torch.Tensor:
    """The step's loss and all gradients of the master weights, in one vector; the policy is left without gradients."""
    algorithm, objective = config.algorithm, Objective(config)
    entropies = torch.cat([policy.logprobs(one)[1] for one in packs])
    constants = constants_of(packs)
    if algorithm.top_entropy_quantile < 1:
        bound = entropy_bound(entropies, quantile=algorithm.top_entropy_quantile)
        constants = constants_of(packs, bound=bound, reaching=math.ceil(algorithm.top_entropy_quantile * len(entropies)))
    total = torch.zeros(())
    for one in packs:
        base_N = policy.logprobs(one, use_adapter=False)[0] if algorithm.beta else None
        old_N = one.sampler_logprobs_N - 0.05 if off_policy else None
        loss = objective.of(one, constants, old_logprobs_N=old_N, reference_logprobs_N=base_N)
        total += policy.backward(one, loss.token_loss, passes=loss.passes, factor=loss.factor)[0]
    gradients = [master.grad.flatten() for master in policy.masters if master.grad is not None]
    for master in policy.masters:
        master.grad = None
    return torch.cat([total[None], *gradients])


TARGETS = {"no head": ["q_proj", "down_proj"], "head": ["v_proj", "lm_head"]}


@pytest.mark.parametrize("targets", TARGETS.values(), ids=TARGETS)
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")  # nothing is merged
def test_how_tokens_are_packed_and_chunked_makes_no_difference(make_policy: Callable[..., Policy], targets: list[str]) -> None:
    policy = make_policy("llama", targets=targets)
    policy.write_slots()
    groups = near_the_policy(policy)
    for (name, options), off_policy in itertools.product(CASES.items(), (False, True)):
        config, results = GRPOConfig(**options), []
        for budget, logits_bytes in ((1000, 2**20), (1000, 1), (30, 1)):  # 1 byte: chunks of 16 tokens
            packs = pack(groups, tokens_per_pack=budget)
            policy._logits_bytes = logits_bytes
            results.append(loss_and_gradients(policy, packs, config, off_policy=off_policy))
        expected, *others = results
        assert expected[1:].any() and expected.isfinite().all(), name
        for result in others:
            assert (result - expected)[0].abs() <= 1e-5 * max(1.0, abs(expected[0].item())), name
            assert (result - expected)[1:].norm() <= 1e-4 * expected[1:].norm(), name
