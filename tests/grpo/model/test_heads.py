"""Head discovery: weight, soft cap and scale give the log-probabilities of the model itself, or the model is refused."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from rankup.grpo.model.heads import head_of
from rankup.kernels.logprob import linear_logprobs


@pytest.fixture
def load(tiny_model_path):
    """A function that loads a tiny model of a kind, with other values in its configuration if asked."""

    def model(kind: str, **config: object) -> PreTrainedModel:
        return AutoModelForCausalLM.from_pretrained(tiny_model_path(kind), dtype="float32", **config)

    return model


def assert_head_gives_the_models_logprobs(model: PreTrainedModel) -> None:
    ids_LS = torch.randint(4, model.config.vocab_size, (3, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected_N = model(ids_LS).logits[:, :-1].log_softmax(-1).gather(2, ids_LS[:, 1:, None]).flatten()
        hidden_ND = model.base_model(ids_LS).last_hidden_state[:, :-1].flatten(0, 1)
    logprobs_N, _ = linear_logprobs(hidden_ND, head_of(model), ids_LS[:, 1:].flatten())
    torch.testing.assert_close(logprobs_N, expected_N, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma2", "gemma3", "cohere", "granite", "hyperclovax"])
def test_the_head_gives_the_logprobs_of_the_model(load, kind: str) -> None:
    assert_head_gives_the_models_logprobs(load(kind))


@pytest.mark.parametrize(
    ("kind", "field", "softcap", "scale"),
    [
        ("llama", None, None, 1.0),
        ("gemma2", "final_logit_softcapping", 5.0, 1.0),
        ("cohere", "logit_scale", None, 5.0),
        ("granite", "logits_scaling", None, 0.2),
        ("hyperclovax", "logits_scaling", None, 5.0),
    ],
)
def test_logit_options_of_the_configuration(
    load, kind: str, field: str | None, softcap: float | None, scale: float
) -> None:
    model = load(kind, **{field: 5.0} if field else {})
    head = head_of(model)
    assert (head.softcap, head.scale, head.adapter) == (softcap, scale, None)
    assert head.weight_VD.data_ptr() == model.get_output_embeddings().weight.data_ptr()
    assert not head.weight_VD.requires_grad
    assert_head_gives_the_models_logprobs(model)


def test_no_cap_is_no_cap(load) -> None:
    model = load("gemma2", final_logit_softcapping=None)
    assert head_of(model).softcap is None
    assert_head_gives_the_models_logprobs(model)


@pytest.mark.parametrize(
    ("kind", "field", "value"),
    [
        ("llama", "logit_scale", 0.5),
        ("llama", "logit_scale", "inv_sqrt_d_model"),
        ("llama", "logits_scaling", 8.0),
        ("granite", "logit_scale", 0.5),
        ("llama", "lm_head_multiplier", 0.5),
        ("gemma2", "output_multiplier", 0.2),
        ("llama", "logits_mup_width_multiplier", 24.0),
        ("llama", "logits_soft_cap", 30.0),
        ("llama", "output_logit_soft_cap", 30.0),
    ],
)
def test_another_change_to_the_logits_is_refused(load, kind: str, field: str, value: object) -> None:
    model = load(kind)
    setattr(model.config, field, value)
    with pytest.raises(ValueError, match=rf"^{type(model).__name__} changes its logits \({field}\)"):
        head_of(model)


def test_a_head_with_a_bias_is_refused(load) -> None:
    model = load("llama")
    model.get_output_embeddings().bias = torch.nn.Parameter(torch.zeros(model.config.vocab_size))
    with pytest.raises(ValueError, match=r"^LlamaForCausalLM has no plain linear head"):
        head_of(model)


def test_a_head_that_is_not_a_linear_layer_is_refused(load) -> None:
    model = load("llama")
    model.set_output_embeddings(torch.nn.Sequential(model.get_output_embeddings()))
    with pytest.raises(ValueError, match=r"^LlamaForCausalLM has no plain linear head"):
        head_of(model)
