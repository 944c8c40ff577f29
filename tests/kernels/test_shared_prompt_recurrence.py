"""Layers with a state over packs of shared prompts, in models of transformers: against one row for each completion."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from attention_oracle import GROUPS, Groups, pack_length
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from rankup.kernels import shared_prompt_attention
from rankup.kernels.recurrence_plan import plan_recurrence
from rankup.kernels.shared_prompt_attention import SharedPromptLayout, active
from rankup.kernels.shared_prompt_recurrence import install, layers_with_state, why_not

COMMON: dict[str, Any] = {
    **{"vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
}
DELTA: dict[str, Any] = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 12,
    "linear_conv_kernel_dim": 4,
}
HYBRID: dict[str, Any] = {"num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"]}
HEADS: dict[str, Any] = {"head_dim": 16}
MAMBA: dict[str, Any] = {
    **{"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 2, "mamba_d_conv": 4, "mamba_expand": 2}
}

MODELS: dict[str, Callable[[], transformers.PreTrainedConfig]] = {
    "qwen3.5": lambda: transformers.Qwen3_5TextConfig(**COMMON, **HYBRID, **DELTA, head_dim=16),
    "qwen3-next": lambda: transformers.Qwen3NextConfig(
        **COMMON, **HYBRID, **DELTA, head_dim=16, num_experts=2, num_experts_per_tok=1, moe_intermediate_size=24,
        shared_expert_intermediate_size=24, mlp_only_layers=[0, 1],
    ),
    "lfm2": lambda: transformers.Lfm2Config(
        **COMMON, num_hidden_layers=2, layer_types=["conv", "full_attention"], conv_L_cache=3, conv_bias=True
    ),
    "granite hybrid": lambda: transformers.GraniteMoeHybridConfig(
        **COMMON, **HYBRID, **MAMBA, num_local_experts=0, num_experts_per_tok=0, shared_intermediate_size=48, mamba_chunk_size=4
    ),
    "nemotron-h": lambda: transformers.NemotronHConfig(
        **COMMON, layers_block_type=["linear_attention", "mlp", "full_attention"], mamba_num_heads=4, mamba_head_dim=16,
        ssm_state_size=8, n_groups=2, chunk_size=4, expand=2, head_dim=16,
    ),
    "falcon-h1": lambda: transformers.FalconH1Config(
        **COMMON, **HEADS, num_hidden_layers=2, mamba_d_ssm=64, mamba_n_heads=4, mamba_d_head=16, mamba_d_state=8,
        mamba_n_groups=2, mamba_chunk_size=4,
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def model_of() -> Callable[[str], Any]:
    """A function from a name to a random model, in fp32, with biases and norms drawn too, whose layers take packs."""
    shared_prompt_attention.register()
    made: dict[str, Any] = {}

    def model(name: str) -> Any:
        if name not in made:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                one = transformers.AutoModelForCausalLM.from_config(MODELS[name](), dtype=torch.float32)
                with torch.no_grad():
                    for parameter in one.parameters():
                        parameter.add_(torch.randn_like(parameter), alpha=0.2)
            assert why_not(one) is None
            install(one)
            made[name] = one.eval()
        return made[name]

    return model


def in_a_pack(model: Any, ids_L: torch.Tensor, groups: Groups) -> torch.Tensor:
    """Hidden states [L, D] of a pack; leaves the layout active, for the backward pass."""
    layout = SharedPromptLayout.build(groups)
    positions = [torch.arange(prompt) for prompt, _ in groups]
    positions_L = torch.cat(
        [
            torch.cat([p, *[torch.arange(len(p), len(p) + n) for n in lengths]])
            for p, (_, lengths) in zip(positions, groups, strict=True)
        ]
    )
    model.set_attn_implementation(shared_prompt_attention.NAME)
    with active(layout):
        output = model.base_model(
            input_ids=ids_L[None], position_ids=positions_L[None], use_cache=False
        )
    return output.last_hidden_state[0]


def row_by_row(model: Any, ids_L: torch.Tensor, groups: Groups) -> torch.Tensor:
    """The same of every prompt, and of every completion behind its prompt, each as a row of its own."""
    model.set_attn_implementation("eager")
    hidden, end = [], 0

    def row(tokens: list[int]) -> torch.Tensor:
        return model.base_model(input_ids=ids_L[tokens][None], use_cache=False).last_hidden_state[0]

    for prompt_length, lengths in groups:
        prompt = list(range(end, end + prompt_length))
        hidden.append(row(prompt))
        end += prompt_length
        for length in lengths:
            if length:
                hidden.append(row([*prompt, *range(end, end + length)])[prompt_length:])
            end += length
    return torch.cat(hidden)


@pytest.mark.parametrize("name", MODELS)
@settings(deadline=None, max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(groups=GROUPS, seed=st.integers(0, 99))
@example(groups=[(1, [])], seed=0)
@example(groups=[(2, [0, 1, 9]), (70, [80, 3]), (3, [])], seed=1)
def test_a_pack_equals_rows(model_of: Callable[[str], Any], name: str, groups: Groups, seed: int) -> None:
    """Hidden states and the gradients of all weights."""
    model = model_of(name)
    generator = torch.Generator().manual_seed(seed)
    ids_L = torch.randint(3, 40, (pack_length(groups),), generator=generator)
    results = []
    for compute in (in_a_pack, row_by_row):
        hidden = compute(model, ids_L, groups)
        slopes = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(seed))
        model.zero_grad()
        (hidden * slopes).sum().backward()
        results.append((hidden.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    (ours, our_grads), (expected, grads) = results
    torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-4)  # chunks of the rules begin elsewhere
    assert our_grads.keys() == grads.keys()
    for weight, grad in grads.items():
        error = (our_grads[weight] - grad).norm() / grad.norm().clamp(min=1e-3)
        assert error <= 1e-3, (weight, error)  # rounding of norms of short vectors in fp32; a wrong state gives 0.1 and more


@pytest.mark.parametrize("name", MODELS)
def test_a_completion_changes_no_other_one(model_of: Callable[[str], Any], name: str) -> None:
    groups: Groups = [(5, [6, 7, 3]), (4, [5])]
    model, ids_L = model_of(name), torch.arange(pack_length(groups)) % 37 + 3
    with torch.no_grad():
        before = in_a_pack(model, ids_L, groups)
        changed = ids_L.clone()
        changed[11:18] = 39 - torch.arange(7)  # the second completion of the first group
        after = in_a_pack(model, changed, groups)
    others = torch.ones(len(ids_L), dtype=torch.bool)
    others[11:18] = False
    assert torch.equal(before[others], after[others])
    assert not torch.isclose(before[11:18], after[11:18]).all(1).any()


@pytest.mark.parametrize("name", MODELS)
def test_outside_of_a_pack_nothing_changes(model_of: Callable[[str], Any], name: str) -> None:
    """With a cache too: generating decodes step by step."""
    model = model_of(name)
    model.set_attn_implementation("eager")
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    with torch.no_grad():
        new = model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
        logits = model(input_ids=new, use_cache=False).logits
    assert torch.equal(logits[0, 4:-1].argmax(-1), new[0, 5:])


def test_every_layer_with_a_state_is_found(model_of: Callable[[str], Any]) -> None:
    assert {name: len(layers_with_state(model_of(name))) for name in MODELS} == {
        "qwen3.5": 1, "qwen3-next": 1, "lfm2": 1, "granite hybrid": 1, "nemotron-h": 1, "falcon-h1": 2
    }  # fmt: skip


def test_other_states_are_a_reason() -> None:
    config = transformers.JambaConfig(
        **COMMON, num_hidden_layers=2, num_experts=1, attn_layer_period=2, attn_layer_offset=1, use_mamba_kernels=False
    )
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    assert (why_not(model) or "").startswith("JambaMambaMixer mixes tokens by ")


def test_the_plan_of_a_pack() -> None:
    plan = plan_recurrence([(2, [3, 0, 1]), (1, [])])
    assert plan.prompts.tokens_UT.tolist() == [[0, 1], [6, 6]]
    assert plan.prompts.is_padding_UT.tolist() == [[False, False], [False, True]]
    assert plan.completions is not None
    assert plan.completions.tokens_UT.tolist() == [[2, 3, 4], [5, 5, 5]]
    assert plan.prompt_of.rows_N.tolist() == [0, 0]
    assert plan.places_L.tolist() == [0, 1, 4, 5, 6, 7, 2]
    windows = plan.windows(3)
    assert windows.tokens_B.tolist() == [0, 1, 2, 3, 5, 6]
    assert windows.seen.rows_N.view(-1, 3)[2:5].tolist() == [[0, 1, 2], [1, 2, 3], [0, 1, 5]]
    assert windows.is_before_BK.tolist() == [[True, True, False], [True, False, False], *[[False] * 3] * 3, [True, True, False]]
