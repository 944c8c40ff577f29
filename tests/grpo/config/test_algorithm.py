"""The sections `algorithm` and `correction`: defaults of each objective, precedence, and errors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rankup.grpo.config import AlgorithmConfig, CorrectionConfig, GRPOConfig, dump_config
from rankup.grpo.config.algorithm import COMMON, CORRECTION_MODES, OBJECTIVES

Load = Callable[..., GRPOConfig]
ErrorOf = Callable[..., str]

# (estimator, scale of rewards, aggregation, level, epsilon, epsilon_high), as the papers have them.
DECIDED: dict[str, tuple[Any, ...]] = {
    "grpo": ("group", "group", "sequence_mean", "token", 0.2, 0.2),
    "dapo": ("group", "group", "token_mean", "token", 0.2, 0.28),
    "dr_grpo": ("group", "none", "constant", "token", 0.2, 0.2),
    "bnpo": ("group", "group", "local_token_mean", "token", 0.2, 0.2),
    "gspo": ("group", "group", "sequence_mean", "sequence", 3e-4, 4e-4),
    "cispo": ("group", "group", "token_mean", "token", 0.2, 5.0),
    "sapo": ("group", "group", "sequence_mean", "token", 0.2, 0.28),
    "rloo": ("rloo", "none", "constant", "token", 0.2, 0.2),
    "reinforce_pp": ("reinforce_pp", "batch", "token_mean", "token", 0.2, 0.2),
    "maxrl": ("maxrl", "none", "token_mean", "token", 0.2, 0.2),
    "mine.py:loss": ("group", "group", "token_mean", "token", 0.2, 0.28),
}


def decided(config: AlgorithmConfig) -> tuple[Any, ...]:
    return tuple(getattr(config, name) for name in COMMON)


# ------------------------------------------------------------------------------------------------ the objective


def test_every_objective_is_in_the_table() -> None:
    assert set(DECIDED) == {*OBJECTIVES, "mine.py:loss"}
    assert GRPOConfig().algorithm.loss_type == "dapo"


@pytest.mark.parametrize("loss_type", DECIDED)
def test_the_defaults_of_each_objective(load: Load, loss_type: str) -> None:
    assert decided(AlgorithmConfig(loss_type=loss_type)) == DECIDED[loss_type]
    assert decided(GRPOConfig(loss_type=loss_type).algorithm) == DECIDED[loss_type]
    assert decided(load(f"algorithm: {{loss_type: '{loss_type}'}}").algorithm) == DECIDED[loss_type]
    assert decided(load("", f"loss_type={loss_type}").algorithm) == DECIDED[loss_type]


@pytest.mark.parametrize("loss_type", DECIDED)
def test_none_means_the_default_of_the_objective(load: Load, loss_type: str) -> None:
    nothing: dict[str, Any] = dict.fromkeys(COMMON)
    assert decided(AlgorithmConfig(loss_type=loss_type, **nothing)) == DECIDED[loss_type]
    text = "algorithm:\n  epsilon: null\n" + f"  loss_type: '{loss_type}'"  # whatever the order
    assert decided(load(text, "scale_rewards=null").algorithm) == DECIDED[loss_type]


@settings(deadline=None)
@given(
    loss_type=st.sampled_from(sorted(DECIDED)),
    given_=st.fixed_dictionaries(
        {},
        optional={
            "advantage_estimator": st.sampled_from(["group", "rloo", "reinforce_pp", "maxrl"]),
            "scale_rewards": st.sampled_from(["group", "batch", "none"]),
            "loss_aggregation": st.sampled_from(["token_mean", "local_token_mean", "sequence_mean", "constant"]),
            "importance_sampling_level": st.sampled_from(["token", "sequence"]),
            "epsilon": st.floats(0, 1),
            "epsilon_high": st.floats(0, 10),
        },
    ),
)
def test_an_explicit_option_takes_precedence(loss_type: str, given_: dict[str, Any]) -> None:
    """Every part goes with every other."""
    expected = dict(zip(COMMON, DECIDED[loss_type], strict=True)) | given_
    assert decided(AlgorithmConfig(loss_type=loss_type, **given_)) == tuple(expected.values())


@pytest.mark.parametrize(("switch", "scale"), [(True, "group"), (False, "none")])
def test_scale_rewards_accepts_a_bool_as_in_trl(load: Load, switch: bool, scale: str) -> None:
    assert GRPOConfig(loss_type="reinforce_pp", scale_rewards=switch).algorithm.scale_rewards == scale
    assert load(f"algorithm: {{scale_rewards: {str(switch).lower()}}}").algorithm.scale_rewards == scale


@pytest.mark.parametrize("loss_type", DECIDED)
@pytest.mark.parametrize("mode", CORRECTION_MODES)
def test_a_dump_reads_back_to_the_same(load: Load, loss_type: str, mode: Any) -> None:
    delta = None if loss_type in ("cispo", "sapo") else 7.5
    config = GRPOConfig(loss_type=loss_type, mode=mode, off_policy_mask_threshold=0.5, delta=delta, entropy_coef=-0.1)
    again = load(dump_config(config))
    assert (again.algorithm, again.correction) == (config.algorithm, config.correction)


def test_another_objective_over_a_dumped_file_brings_its_defaults(load: Load) -> None:
    dumped = dump_config(GRPOConfig(loss_type="cispo", mode="icepop", epsilon=0.1))
    config = load(dumped, "algorithm.loss_type=gspo", "correction.mode=none")
    assert config.algorithm.importance_sampling_level == "sequence" and config.algorithm.epsilon_high == 4e-4
    assert config.algorithm.epsilon == 0.1, "explicit options are kept"
    assert (config.correction.cap, config.correction.veto) == (2.0, 0.0)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["loss_type=cispo", "delta=9"], "algorithm.delta: has no effect with cispo"),
        (["soft_overlong_tokens=300"], "must be at most rollout.max_completion_length, which is 256 (got 300)"),
        (["soft_overlong_tokens=3", "loss_type=maxrl"], "algorithm.soft_overlong_tokens: cannot be used with maxrl"),
    ],
)
def test_options_that_exclude_each_other(error_of: ErrorOf, overrides: list[str], message: str) -> None:
    assert message in error_of("", *overrides)


def test_a_small_cap_without_icepop_needs_no_floor_below_it(load: Load) -> None:
    config = GRPOConfig(mode="token_truncate", cap=0.4)
    assert load(dump_config(config)).correction.cap == 0.4
    with pytest.raises(ValueError, match=r"correction.floor: must be below correction.cap, which is 0.4"):
        GRPOConfig(mode="icepop", cap=0.4)


CASES = [("dapo", None), ("a/mine.py:loss", "a/mine.py:loss"), ("my.mod:f", "my.mod:f")]


@pytest.mark.parametrize(("loss_type", "custom"), CASES)
def test_user_supplied_objectives_are_recognised(loss_type: str, custom: str | None) -> None:
    assert AlgorithmConfig(loss_type=loss_type).custom_loss == custom


@pytest.mark.parametrize(
    ("options", "needs"), [({}, False), ({"beta": 0.01}, True), ({"entropy_coef": 0.01}, True), ({"entropy_coef": -0.01}, True)]
)
def test_penalties_and_bonuses_need_every_group(options: dict[str, float], needs: bool) -> None:
    assert AlgorithmConfig(**options).needs_every_group == needs  # type: ignore[arg-type]


@pytest.mark.parametrize("loss_type", ["dpo", "mine.py", "mine.py:", ":loss", "mine.py:2nd", "GRPO"])
def test_the_error_for_an_unknown_objective_lists_all(error_of: ErrorOf, loss_type: str) -> None:
    message = error_of("", f"loss_type='{loss_type}'")
    names = "grpo, dapo, dr_grpo, bnpo, gspo, cispo, sapo, rloo, reinforce_pp, maxrl"
    assert message == (
        f"algorithm.loss_type: must be {names}, or your own function, path/to/file.py:name (got {loss_type!r})"
    )


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("delta=1.28", "algorithm.delta: must be above 1 + algorithm.epsilon_high, which is 1.28 (got 1.28)"),
        ("epsilon=1.5", "algorithm.epsilon: must be at most 1.0 (got 1.5)"),
        ("epsilon_high=-1", "algorithm.epsilon_high: must be at least 0.0 (got -1)"),
        ("top_entropy_quantile=0", "algorithm.top_entropy_quantile: must be above 0.0 (got 0)"),
        ("num_iterations=0", "algorithm.num_iterations: must be at least 1 (got 0)"),
        ("soft_overlong_tokens=-1", "algorithm.soft_overlong_tokens: must be at least 0 (got -1)"),
        ("off_policy_mask_threshold=0", "algorithm.off_policy_mask_threshold: must be above 0.0 (got 0)"),
        ("scale_rewards=yes please", "algorithm.scale_rewards: must be 'group', 'batch' or 'none' (got 'yes please')"),
        (
            "advantage_estimator=gae",
            "algorithm.advantage_estimator: must be group, rloo, reinforce_pp, maxrl, or your own function, "
            "path/to/file.py:name (got 'gae')",
        ),
        ("importance_sampling_level=word", "algorithm.importance_sampling_level: must be 'token' or 'sequence' (got 'word')"),
    ],
)
def test_the_error_for_a_wrong_value_is_one_line(error_of: ErrorOf, override: str, message: str) -> None:
    assert error_of("", override) == message


def test_one_mistake_is_one_line(error_of: ErrorOf) -> None:
    """A wrong objective does not make what it would have decided wrong too."""
    assert len(error_of("", "loss_type=dpo", "delta=1.3").splitlines()) == 1


# ----------------------------------------------------------------------------------------------- the correction


def test_defaults_of_the_correction() -> None:
    config = GRPOConfig().correction
    assert (config.mode, config.cap, config.veto) == ("token_truncate", 2.0, 1e-4)
    assert CorrectionConfig(mode="icepop").cap == 5.0 and CorrectionConfig(mode="icepop").floor == 0.5
    assert CorrectionConfig(mode="icepop", cap=3.0).cap == 3.0 and CorrectionConfig(mode="token_mask", cap=None).cap == 2.0  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "mode"), [("true", "token_truncate"), ("false", "none"), ("none", "none"), ("icepop", "icepop")]
)
def test_the_mode_or_the_switch_of_trl(load: Load, text: str, mode: str) -> None:
    assert load(f"correction: {{mode: {text}}}").correction.mode == mode
    correction = load("", f"vllm_importance_sampling_correction={text}").correction
    assert correction.mode == mode
    assert correction.veto == (0.0 if mode == "none" else 1e-4), "off turns the veto off too"


def test_names_of_trl_for_the_correction() -> None:
    config = GRPOConfig(vllm_importance_sampling_mode="sequence_mask", vllm_importance_sampling_clip_max=3.0)
    assert (config.correction.mode, config.correction.cap) == ("sequence_mask", 3.0)


@pytest.mark.parametrize(("switch", "mode"), [(True, "token_mask"), (False, "none")])
def test_switch_and_mode_of_trl_together_have_the_meaning_of_trl(load: Load, switch: bool, mode: str) -> None:
    """TRL: "If set to `False`, no IS is applied regardless of `vllm_importance_sampling_mode`"."""
    config = GRPOConfig(vllm_importance_sampling_correction=switch, vllm_importance_sampling_mode="token_mask")
    assert config.correction.mode == mode
    assert config.correction.veto == (1e-4 if switch else 0.0)
    lines = [f"vllm_importance_sampling_correction: {str(switch).lower()}", "vllm_importance_sampling_mode: token_mask"]
    for in_file, override in (lines, lines[::-1]):
        assert load(in_file, override.replace(": ", "=")).correction.mode == mode
    assert load("\n".join(lines), "correction.mode=icepop").correction.mode == ("icepop" if switch else "none")


def test_a_mistyped_mode_is_reported_with_the_switch(error_of: ErrorOf) -> None:
    for switch in ("true", "false"):
        error = error_of("", f"vllm_importance_sampling_correction={switch}", "vllm_importance_sampling_mode=token")
        assert error.startswith("correction.mode: must be 'none', ")
    error = error_of("", "vllm_importance_sampling_correction=icepop", "vllm_importance_sampling_mode=token_mask")
    assert error == (
        "correction: vllm_importance_sampling_correction must be true or false when a mode is set too (got 'icepop')"
    )


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["correction.mode=tis"], "correction.mode: must be 'none', 'token_truncate', 'token_mask', 'icepop', "),
        (["correction.cap=0"], "correction.cap: must be above 0.0 (got 0)"),
        (["correction.veto=1"], "correction.veto: must be below 1.0 (got 1)"),
        (["mode=icepop", "cap=2", "floor=2"], "correction.floor: must be below correction.cap, which is 2 (got 2)"),
        (["mode=icepop", "cap=1.5", "floor=1.7"], "correction.floor: must be below correction.cap, which is 1.5 (got 1.7)"),
    ],
)
def test_the_error_for_a_wrong_correction_is_one_line(error_of: ErrorOf, overrides: list[str], message: str) -> None:
    error = error_of("", *overrides)
    assert error.startswith(message) and len(error.splitlines()) == 1
