"""The replacements for parts of vLLM on CPU: sampling of tokens, norms, adapted layers."""

import pytest
import torch

from rankup.rollout.config import SamplingConfig
from rankup.rollout.cpu_ops import BLOCK, draw_tokens, flat_rotary, sample

LAST = 1.0 - 2.0**-53  # the largest number that a generator returns


def logprobs_of(weights):
    return (weights / weights.sum(-1, keepdim=True)).log().float()


@pytest.mark.parametrize("vocabulary", [1, 5, BLOCK, BLOCK + 1, 3 * BLOCK, 1000])
def test_sampling_inverts_the_cumulative_distribution(vocabulary):
    generator = torch.Generator().manual_seed(vocabulary)
    weights = torch.rand(200, vocabulary, generator=generator, dtype=torch.float64) ** 4
    logprobs = logprobs_of(weights)
    uniform = torch.rand(200, generator=generator, dtype=torch.float64)
    tokens = draw_tokens(logprobs, uniform)
    cumulated = logprobs.double().exp().cumsum(-1)
    cumulated /= cumulated[:, -1:].clone()
    upper = cumulated.gather(1, tokens[:, None])[:, 0]
    lower = upper - (logprobs.double().exp() / logprobs.double().exp().sum(-1, keepdim=True)).gather(1, tokens[:, None])[:, 0]
    assert (uniform < upper + 1e-6).all() and (uniform > lower - 1e-6).all()


@pytest.mark.parametrize("uniform", [0.0, 0.5, LAST])
@pytest.mark.parametrize("allowed", [[0], [999], [255, 256], [7, 300, 998]])
def test_an_excluded_token_is_never_sampled(uniform, allowed):
    logprobs = torch.full((1, 1000), float("-inf"))
    logprobs[0, allowed] = torch.tensor([1.0 / len(allowed)]).log()
    assert int(draw_tokens(logprobs, torch.tensor([uniform], dtype=torch.float64))) in allowed


def test_the_last_token_can_be_sampled_and_an_unlikely_one_is_not_favored():
    logprobs = logprobs_of(torch.tensor([[1.0, *[0.0] * 998, 1e-9]], dtype=torch.float64))
    assert int(draw_tokens(logprobs, torch.tensor([LAST], dtype=torch.float64))) == 999
    assert int(draw_tokens(logprobs, torch.tensor([0.999], dtype=torch.float64))) == 0


def test_frequencies_are_the_probabilities():
    draws, vocabulary = 200_000, 600
    weights = torch.rand(vocabulary, generator=torch.Generator().manual_seed(0), dtype=torch.float64) ** 3
    logprobs = logprobs_of(weights[None])
    uniform = torch.rand(draws, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    counts = draw_tokens(logprobs.expand(draws // 100, -1), uniform[: draws // 100]).bincount(minlength=vocabulary)
    for part in uniform.chunk(100)[1:]:
        counts += draw_tokens(logprobs.expand(len(part), -1), part).bincount(minlength=vocabulary)
    expected = weights / weights.sum() * draws
    often = expected > 20
    chi_square = ((counts - expected) ** 2 / expected)[often].sum() / often.sum()
    assert 0.8 < chi_square < 1.2


@pytest.mark.engine
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_are_those_of_the_formula(dtype):
    from rankup.rollout import cpu_ops
    from rankup.rollout.vllm_compat import cpu_norms

    assert cpu_norms() == cpu_norms(), "registering twice has no effect"
    generator = torch.Generator().manual_seed(0)
    x, residual = (torch.randn(7, 96, generator=generator).to(dtype) for _ in range(2))
    weight = torch.randn(96, generator=generator).to(dtype)

    def formula(t):
        return weight.double() * t / (t.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()

    tolerance = {torch.float32: 1e-6, torch.bfloat16: 2.0**-7}[dtype]
    assert torch.allclose(cpu_ops.rms_norm(x, weight, 1e-5).double(), formula(x.double()), rtol=tolerance, atol=1e-6)
    total = x.double() + residual.double()
    normed, kept = cpu_ops.fused_add_rms_norm(x.clone(), residual.clone(), weight, 1e-5)
    assert torch.allclose(kept.double(), total, rtol=tolerance, atol=1e-6)
    assert torch.allclose(normed.double(), formula(total), rtol=2 * tolerance, atol=2 * tolerance)


def test_vllm_computes_norms_that_the_kernel_does_not_support():
    from rankup.rollout.cpu_ops import takes_fused_add_rms_norm, takes_rms_norm

    x, weight = torch.ones(4, 8), torch.ones(8)
    assert takes_rms_norm(x, weight, 1e-5)
    assert not takes_rms_norm(x, None, 1e-5)
    assert not takes_rms_norm(x, weight, 1e-5, 4)
    assert not takes_rms_norm(x, weight.bfloat16(), 1e-5)
    assert not takes_rms_norm(x[:, ::2], weight[::2], 1e-5)
    assert takes_fused_add_rms_norm(x, x.clone(), weight, 1e-5)
    assert not takes_fused_add_rms_norm(x, x[:1].expand(4, 8), weight, 1e-5)


@pytest.mark.engine
def test_the_engine_uses_the_replacements(make_engine):
    engine = make_engine()
    from vllm import ir

    assert ir.ops.rms_norm.get_priority()[0] == ir.ops.fused_add_rms_norm.get_priority()[0] == "rankup_cpu"
    layers = engine._apply_model(
        lambda model: [m for name, m in model.named_modules() if name.endswith(("_proj",)) and hasattr(m, "punica_wrapper")]
    )
    assert len(layers) == 8, "qkv, o, gate_up, down in each of two layers"
    assert {layer.apply.__module__ for layer in layers} == {"rankup.rollout.cpu_ops"}
    worker = engine._engine.model_executor.driver_worker.worker
    assert worker.model_runner.sampler.topk_topp_sampler.forward is sample


def sampled(logits, *, k=None, p=None, generators=None):
    """Tokens and log-probabilities, called as vLLM calls the sampler."""
    from rankup.rollout.vllm_compat import import_vllm

    import_vllm()
    rows = len(logits)
    limits = [None if limit is None else torch.full((rows,), limit) for limit in (k, p)]
    return sample(logits, generators or {}, *limits)


@pytest.mark.engine
@pytest.mark.parametrize("limits", [{}, {"k": 3}, {"p": 0.5}, {"k": 20, "p": 0.9}])
def test_tokens_are_sampled_with_the_returned_log_probabilities(limits):
    logits = torch.randn(50, generator=torch.Generator().manual_seed(0)).expand(5000, 50)
    tokens, logprobs = sampled(logits.clone(), **limits)
    likeliest_first = logits[0].sort(descending=True)
    cumulated = likeliest_first.values[: limits.get("k", 50)].softmax(-1).cumsum(-1)  # the nucleus of what top-k leaves
    size = min(int((cumulated < limits.get("p", 2.0)).sum()) + 1, len(cumulated))
    allowed = set(likeliest_first.indices[:size].tolist())
    assert set(logprobs[0].isfinite().nonzero()[:, 0].tolist()) == allowed
    assert float(logprobs[0].exp().sum()) == pytest.approx(1.0, abs=1e-5)
    frequencies = tokens.bincount(minlength=50) / len(tokens)
    assert set(frequencies.nonzero()[:, 0].tolist()) <= allowed
    assert (frequencies - logprobs[0].exp()).abs().max() < 0.04, "five standard deviations of 5,000 draws"


@pytest.mark.engine
def test_a_seed_determines_only_its_row():
    logits = torch.zeros(3, 1000)
    draws = [sampled(logits, generators={1: torch.Generator().manual_seed(7)})[0].tolist() for _ in range(6)]
    assert len({draw[1] for draw in draws}) == 1
    assert len({draw[0] for draw in draws}) > 1 and len({draw[2] for draw in draws}) > 1
    generator = torch.Generator().manual_seed(7)
    steps = [int(sampled(logits, generators={1: generator})[0][1]) for _ in range(6)]
    assert steps[0] == draws[0][1] and len(set(steps)) > 1


@pytest.mark.engine
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_stop_the_run(value):
    logits = torch.zeros(2, 10)
    logits[1, 4] = value
    with pytest.raises(RuntimeError, match="logits are not finite"):
        sampled(logits)


@pytest.mark.engine
def test_text_is_decoded_from_the_tokens_and_ends_before_a_stop_string(make_engine, tiny_model_path):
    from transformers import AutoTokenizer

    engine = make_engine()
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_path("llama"))
    (group,) = engine.rollout([[5, 9, 14]], SamplingConfig(num_generations=8, max_completion_length=20), seeds=[1])
    assert [c.text for c in group.completions] == [
        tokenizer.decode(c.token_ids[:-1] if c.finish_reason == "stop" else c.token_ids, skip_special_tokens=True)
        for c in group.completions
    ]
    stop = next(c.text for c in group.completions if len(c.text) > 4)[2:4]
    stopping = SamplingConfig(num_generations=8, max_completion_length=20, stop=[stop])
    (group,) = engine.rollout([[5, 9, 14]], stopping, seeds=[1])
    assert any(c.finish_reason == "stop" for c in group.completions)
    assert all(stop not in c.text for c in group.completions)


def test_rotary_embeddings_of_queries_of_three_dimensions() -> None:
    """vLLM's kernel rotates them by the positions of other tokens."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers.rotary_embedding import get_rope

    with set_current_vllm_config(VllmConfig()):
        rope = get_rope(16, max_position=64, rope_parameters={"rope_type": "default", "rope_theta": 1e4}, dtype=torch.float32)
    positions, query, key = torch.arange(3, 10), torch.randn(7, 4, 16), torch.randn(7, 2, 16)
    expected = rope.forward_native(positions, query.clone(), key.clone())
    ours = flat_rotary(type(rope).forward_cpu)(rope, positions, query.clone(), key.clone())
    for got, wanted in zip(ours, expected, strict=True):
        torch.testing.assert_close(got, wanted)
    alone, none = flat_rotary(type(rope).forward_cpu)(rope, positions, query.clone(), None)
    torch.testing.assert_close(alone, expected[0])
    assert none is None
