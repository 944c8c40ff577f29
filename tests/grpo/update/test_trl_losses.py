"""Losses, corrections and advantages against those of TRL, by calling TRL itself on the same tensors.

`GRPOTrainer._compute_loss` runs on an object that was never initialised: it gets the attributes that the method reads, and the
log-probabilities in place of a model. Computations inside TRL's long methods (advantages, importance weights) are
cut out of them, statement by statement, and run.

TRL's loss types without a counterpart here: `luspo` and `vespo`. Options without one: the adaptive entropy coefficient, RLOO's
`normalize_advantages` and its KL in the reward. TRL's sequence modes of the importance weight take the product over a
completion, ours the geometric mean; there TRL gets our weights.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import textwrap
from collections import defaultdict
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sample_groups import loss_on_leaves, random_groups
from torch.nn.utils.rnn import pad_sequence

from rankup.grpo.algorithm.advantages import group_advantages
from rankup.grpo.algorithm.corrections import correction_weights
from rankup.grpo.algorithm.losses import Counts, entropy_bound
from rankup.grpo.common.quiet import quiet_stderr
from rankup.grpo.config import GRPOConfig
from rankup.grpo.model.packing import Pack, pack
from rankup.grpo.update.learner import without_truncated
from rankup.grpo.update.objective import Objective, StepConstants

pytestmark = pytest.mark.slow

SHAPES = [(4, [3, 1, 6, 2]), (2, [7, 4, 1, 5])]
TRUNCATED = (2,)  # of each group, where completions that were cut off are masked
MAX_COMPLETION_LENGTH = 9
LOSS_TYPES = ["grpo", "dapo", "dr_grpo", "bnpo", "cispo", "sapo", "gspo"]

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "delta": {"delta": 1.35},
    "kl": {"beta": 0.3},
    "corrected kl": {"beta": 0.3, "use_bias_correction_kl": True},
    "token_truncate": {"mode": "token_truncate", "cap": 1.1},
    "token_mask": {"mode": "token_mask", "cap": 1.1},
    "icepop": {"mode": "icepop", "floor": 0.9, "cap": 1.1},
    "sequence_mask": {"mode": "sequence_mask", "cap": 1.02},
    "entropy": {"entropy_coef": 0.2},
    "quantile": {"top_entropy_quantile": 0.3},
    "quantile and entropy": {"top_entropy_quantile": 0.3, "entropy_coef": 0.2},
    "off-policy mask": {"off_policy_mask_threshold": 0.05},
    "off-policy mask and kl": {"off_policy_mask_threshold": 0.05, "beta": 0.3},
    "truncated": {"mask_truncated_completions": True},
    "all": {
        "beta": 0.3,
        "mode": "token_truncate",
        "cap": 1.1,
        "entropy_coef": 0.2,
        "top_entropy_quantile": 0.5,
        "off_policy_mask_threshold": 0.05,
        "mask_truncated_completions": True,
    },
}


@pytest.fixture(scope="module")
def trl() -> Any:
    """TRL's module of the GRPO trainer. It is loaded in a fixture since it takes seconds, and speaks while it does."""
    with quiet_stderr():
        return importlib.import_module("trl.trainer.grpo_trainer")


class Case(NamedTuple):
    """The same numbers for both sides: our pack without masked completions, and everything by token for all completions.

    logprobs_M, entropies_M: leaves of all M tokens. old_M: None on-policy. kept_M: True for tokens in the pack.
    """

    config: GRPOConfig
    one: Pack
    lengths: list[int]
    kept_M: torch.Tensor
    advantages_S: torch.Tensor
    logprobs_M: torch.Tensor
    entropies_M: torch.Tensor
    sampler_M: torch.Tensor
    old_M: torch.Tensor | None
    base_M: torch.Tensor


def make_case(loss_type: str, options: dict[str, Any], *, off_policy: bool) -> Case:
    """Log-probabilities so far from the old and the sampler's that each clip and mask holds some tokens."""
    named: dict[str, Any] = {"mode": "none", "max_completion_length": MAX_COMPLETION_LENGTH, "veto": 0.0} | options
    named |= {"epsilon": 0.1, "epsilon_high": 1.15 if loss_type == "cispo" else 0.2}
    if loss_type in ("cispo", "sapo") or "delta" not in options:
        named.pop("delta", None)
    config = GRPOConfig(loss_type=loss_type, **named)
    groups = random_groups(SHAPES, truncated=TRUNCATED)
    masks = config.algorithm.mask_truncated_completions
    (one,) = pack([without_truncated(w) for w in groups] if masks else groups, tokens_per_pack=1000)
    completions = [c for w in groups for c in w.completions]
    sampler_M = torch.tensor([logprob for c in completions for logprob in c.logprobs])
    generator = torch.Generator().manual_seed(1)

    def noise(width: float) -> torch.Tensor:
        return width * (torch.rand(len(sampler_M), generator=generator) - 0.5)

    old_M = sampler_M + noise(0.4)
    lengths_S = torch.tensor([len(c.token_ids) for c in completions])
    kept_S = torch.tensor([not masks or c.finish_reason != "length" for c in completions])
    return Case(
        config=config,
        one=one,
        lengths=lengths_S.tolist(),
        kept_M=kept_S.repeat_interleave(lengths_S),
        advantages_S=torch.tensor([a for w in groups for a in w.advantages]),
        logprobs_M=(old_M + noise(0.9)).requires_grad_(),
        entropies_M=(2.0 + noise(3.0)).requires_grad_(),
        sampler_M=sampler_M,
        old_M=old_M if off_policy else None,
        base_M=old_M + noise(1.0),
    )


def ours(case: Case) -> torch.Tensor:
    """Our loss, a function of the leaves. Groups without variance count, as in TRL."""
    algorithm, kept_M = case.config.algorithm, case.kept_M
    entropies_N, tokens = case.entropies_M[kept_M], int(kept_M.sum())
    quantile = algorithm.top_entropy_quantile
    bound = None if quantile == 1.0 else entropy_bound(entropies_N.detach(), quantile=quantile)
    counts = Counts(
        sequences=len(case.lengths), tokens=tokens, local_tokens=tokens, max_completion_length=MAX_COMPLETION_LENGTH
    )
    active = tokens if bound is None else int((entropies_N >= bound).sum())
    loss = Objective(case.config).of(
        case.one,
        StepConstants(counts=counts, entropy_bound=bound, entropy_tokens=active),
        old_logprobs_N=None if case.old_M is None else case.old_M[kept_M],
        reference_logprobs_N=case.base_M[kept_M] if algorithm.beta else None,
    )
    return loss_on_leaves(loss, case.logprobs_M[kept_M], entropies_N)


def rows(case: Case, values_M: torch.Tensor, *, padding: float = -1.0) -> torch.Tensor:
    """[S, T]: one completion a row."""
    return pad_sequence(list(values_M.split(case.lengths)), batch_first=True, padding_value=padding)


def statement(method: Any, test: str, *, assigns: str) -> Any:
    """Code of the `if` statement of a method whose condition is `test` and that somewhere assigns the variable."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(method)))
    found = [node for node in ast.walk(tree) if isinstance(node, ast.If) and ast.unparse(node.test) == test]
    (one,) = [node for node in found if f"{assigns} = " in ast.unparse(node)]
    return compile(ast.Module(body=[one], type_ignores=[]), f"<TRL: if {test}>", "exec")


def importance_weights(trl: Any, case: Case, mask_ST: torch.Tensor) -> torch.Tensor:
    """TRL's weights, [S, T]; those of a sequence are ours, see the module's docstring."""
    correction, old_M = case.config.correction, case.logprobs_M.detach() if case.old_M is None else case.old_M
    if correction.mode.startswith("sequence"):
        weights_M = correction_weights(old_M - case.sampler_M, torch.tensor(case.lengths), correction)
        return rows(case, weights_M, padding=1.0)
    trainer = SimpleNamespace(
        use_vllm=True,
        vllm_importance_sampling_correction=True,
        vllm_importance_sampling_mode="token_truncate" if correction.mode == "token_truncate" else "token_mask",
        vllm_importance_sampling_clip_min=correction.floor if correction.mode == "icepop" else None,
        vllm_importance_sampling_clip_max=correction.cap,
    )
    names = {
        "self": trainer,
        "torch": torch,
        "math": trl.math,
        "old_per_token_logps": rows(case, old_M),
        "sampling_per_token_logps": rows(case, case.sampler_M),
        "completion_mask": mask_ST,
        "tool_mask": None,
    }
    method = trl.GRPOTrainer._generate_and_score_completions
    condition = "self.use_vllm and self.vllm_importance_sampling_correction"
    exec(statement(method, condition, assigns="vllm_importance_sampling_ratio"), names)
    return names["vllm_importance_sampling_ratio"]


def uninitialised_trainer(trl: Any, case: Case) -> Any:
    """TRL's trainer with what its loss reads."""
    algorithm = case.config.algorithm
    trainer = trl.GRPOTrainer.__new__(trl.GRPOTrainer)
    same_tensor = SimpleNamespace(
        num_processes=1,
        sync_gradients=True,
        gather=lambda t: t,
        pad_across_processes=lambda t, **_: t,
        reduce=lambda t, **_: t,
    )
    for name, value in {
        "args": SimpleNamespace(
            delta=algorithm.delta,
            sapo_temperature_pos=algorithm.sapo_temperature_pos,
            sapo_temperature_neg=algorithm.sapo_temperature_neg,
            use_bias_correction_kl=algorithm.use_bias_correction_kl,
            steps_per_generation=1,
        ),
        "accelerator": same_tensor,
        "model": SimpleNamespace(training=True),
        "loss_type": "grpo" if algorithm.loss_type == "gspo" else algorithm.loss_type,
        "importance_sampling_level": algorithm.importance_sampling_level,
        "epsilon_low": algorithm.epsilon,
        "epsilon_high": algorithm.epsilon_high,
        "beta": algorithm.beta,
        "top_entropy_quantile": algorithm.top_entropy_quantile,
        "off_policy_mask_threshold": algorithm.off_policy_mask_threshold,
        "_entropy_bonus_enabled": algorithm.entropy_coef != 0,
        "use_adaptive_entropy": False,
        "entropy_coef": algorithm.entropy_coef,
        "use_vllm": True,
        "vllm_importance_sampling_correction": case.config.correction.mode != "none",
        "max_completion_length": MAX_COMPLETION_LENGTH,
        "current_gradient_accumulation_steps": 1,
        "aux_loss_enabled": False,
        "_metrics": {"train": defaultdict(list)},
        "_get_per_token_logps_and_entropies": lambda *_, **__: (
            rows(case, case.logprobs_M),
            rows(case, case.entropies_M, padding=0.0),
            None,
        ),
    }.items():
        setattr(trainer, name, value)
    return trainer


def theirs(trl: Any, case: Case) -> tuple[torch.Tensor, dict[str, list[float]]]:
    """TRL's loss, a function of the same leaves, and its metrics."""
    mask_ST = rows(case, case.kept_M.float(), padding=0.0)
    prompts_S1 = torch.ones(len(mask_ST), 1)
    inputs = {
        "prompt_ids": prompts_S1,
        "prompt_mask": prompts_S1,
        "completion_ids": mask_ST,
        "completion_mask": mask_ST,
        "advantages": case.advantages_S,
        "num_items_in_batch": mask_ST.sum(),
        "sampling_per_token_logps": rows(case, case.sampler_M),
        "ref_per_token_logps": rows(case, case.base_M),
    }
    if case.old_M is not None:
        inputs["old_per_token_logps"] = rows(case, case.old_M)
    if case.config.correction.mode != "none":
        inputs["importance_sampling_ratio"] = importance_weights(trl, case, mask_ST)
    trainer = uninitialised_trainer(trl, case)
    return trainer._compute_loss(trainer.model, inputs), trainer._metrics["train"]


def gradients(case: Case, loss: torch.Tensor) -> tuple[torch.Tensor, ...]:
    leaves = (case.logprobs_M, case.entropies_M)
    return torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)


@pytest.mark.parametrize("off_policy", [False, True], ids=["on-policy", "off-policy"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_loss_and_gradients_are_those_of_trl(trl: Any, loss_type: str, options: dict[str, Any], off_policy: bool) -> None:
    case = make_case(loss_type, options, off_policy=off_policy)
    measured, (expected, _) = ours(case), theirs(trl, case)
    torch.testing.assert_close(measured, expected, rtol=1e-5, atol=1e-6)
    ours_by_leaf, theirs_by_leaf = gradients(case, measured), gradients(case, expected)
    for gradient, oracle in zip(ours_by_leaf, theirs_by_leaf, strict=True):
        assert (gradient - oracle).norm() <= 1e-5 * oracle.norm()
    assert theirs_by_leaf[0].count_nonzero() > 0
    assert theirs_by_leaf[1].any() == ("entropy_coef" in options)


@pytest.mark.parametrize("name", ["delta", "off-policy mask", "token_mask", "icepop", "sequence_mask", "quantile", "truncated"])
def test_the_cases_are_such_that_every_option_matters(name: str) -> None:
    """Options that did nothing to these numbers would be compared in vain."""
    plain, case = (make_case("dapo", options, off_policy=True) for options in ({}, OPTIONS[name]))
    assert abs(ours(case).item() - ours(plain).item()) > 1e-3


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo", "bnpo", "cispo"])
def test_clip_ratios_are_those_of_trl(trl: Any, loss_type: str) -> None:
    case = make_case(loss_type, {}, off_policy=True)
    _, metrics = theirs(trl, case)
    assert case.old_M is not None
    counts = Objective(case.config).clip_counts(case.one, case.logprobs_M.detach(), case.old_M)
    low, high = (counts / len(case.old_M)).tolist()
    if loss_type == "cispo":
        assert [high] == pytest.approx(metrics["cispo_clip_ratio"]) and low == 0 < high
    else:
        assert [low, high] == pytest.approx([metrics[f"clip_ratio/{side}_mean"][0] for side in ("low", "high")])
        assert low > 0 and high > 0


# ----------------------------------------------------------------------------------------------------- advantages

REWARDS = st.lists(
    st.lists(st.none() | st.sampled_from([0.0, 0.25, 0.5, 1.0, 2.0]), min_size=4, max_size=4), min_size=1, max_size=4
)


def reward_table(rewards: list[list[float | None]]) -> torch.Tensor:
    """[B * G, 1]: one reward function, NaN where it gave none."""
    return torch.tensor([[float("nan") if r is None else r] for group in rewards for r in group], dtype=torch.float64)


@settings(deadline=None)
@given(rewards=REWARDS, scale=st.sampled_from(["group", "batch", "none"]))
def test_advantages_are_those_of_trl(trl: Any, rewards: list[list[float | None]], scale: Any) -> None:
    table = reward_table(rewards)
    trainer = SimpleNamespace(
        multi_objective_aggregation="sum_then_normalize", scale_rewards=scale, reward_weights=torch.ones(1, dtype=table.dtype)
    )
    names = {
        "self": trainer,
        "torch": torch,
        "nanstd": trl.nanstd,
        "device": "cpu",
        "num_generations": 4,
        "rewards_per_func": table,
        "unscorable_mask": table.isnan().all(dim=1),
    }
    condition = "self.multi_objective_aggregation == 'sum_then_normalize'"
    exec(statement(trl.GRPOTrainer._generate_and_score_completions, condition, assigns="advantages"), names)
    expected = torch.nan_to_num(names["advantages"], nan=0.0)
    results = group_advantages(rewards, scale_rewards=scale)
    measured = torch.tensor([a for result in results for a in result.advantages], dtype=torch.float64)
    torch.testing.assert_close(measured, expected, rtol=1e-6, atol=1e-6)


@pytest.fixture(scope="module")
def rloo_trainer(trl: Any) -> Any:
    with quiet_stderr():
        return importlib.import_module("trl.trainer.rloo_trainer").RLOOTrainer


@settings(deadline=None)
@given(rewards=REWARDS)
def test_rloo_is_that_of_trl(rloo_trainer: Any, rewards: list[list[float | None]]) -> None:
    table = reward_table(rewards)[:, 0]
    grouped = table.view(-1, 4)
    names = {
        "torch": torch,
        "rewards": table,
        "num_generations": 4,
        "grouped_rewards": grouped,
        "scorable_counts": (~grouped.isnan()).sum(dim=1, keepdim=True),
        "grouped_sum": grouped.nansum(dim=1, keepdim=True),
    }
    exec(statement(rloo_trainer._generate_and_score_completions, "num_generations > 1", assigns="baselines"), names)
    expected = torch.nan_to_num(names["advantages"], nan=0.0)
    results = group_advantages(rewards, estimator="rloo", scale_rewards="none")
    measured = torch.tensor([a for result in results for a in result.advantages], dtype=torch.float64)
    torch.testing.assert_close(measured, expected, rtol=1e-6, atol=1e-6)
