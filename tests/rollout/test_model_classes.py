"""The class that a checkpoint is trained as: with a vision tower the complete one, without the tower."""

from __future__ import annotations

import pytest
import torch
import transformers
from families import FAMILIES, config_of

from rankup.rollout.model_classes import TRAINED_WITH_TOWER, auto_class, build_model, check_class, has_tower, towers

WITH_TOWER = [name for name, family in FAMILIES.items() if family.tower is not None]


@pytest.mark.parametrize("family", WITH_TOWER)
def test_a_checkpoint_is_built_without_its_tower(family: str) -> None:
    config = config_of(family)
    with torch.device("meta"):
        complete, model = auto_class(config).from_config(config), build_model(config)
    of_tower = tuple(f"model.{name}." for name in towers(complete))
    assert type(model) is type(complete) and len(of_tower) > 0
    kept = {name: weight.shape for name, weight in model.named_parameters()}
    assert kept == {n: w.shape for n, w in complete.named_parameters() if not n.startswith(of_tower)}
    assert {name.partition(".layers.")[0] for name in kept if ".layers." in name} == {"model.language_model"}
    assert not towers(model)


@pytest.mark.parametrize("family", WITH_TOWER)
def test_the_placeholder_of_an_image_is_a_token_like_others(family: str) -> None:
    """In vLLM it is, so a completion that has one must be trained as it was sampled."""
    config = config_of(family)
    ids = torch.tensor([[5, config.image_token_id, 9, 17]])
    model = build_model(config).eval()
    with torch.no_grad():
        of_text = model.lm_head(model.get_decoder()(input_ids=ids).last_hidden_state)
        assert torch.equal(model(input_ids=ids).logits, of_text)


@pytest.mark.parametrize("family", FAMILIES)
def test_which_checkpoints_have_a_tower(family: str) -> None:
    config = config_of(family)
    assert has_tower(config) is (family in WITH_TOWER)
    check_class(config)


def test_all_kinds_that_are_trained_with_a_tower_are_tested() -> None:
    assert {config_of(family).model_type for family in WITH_TOWER} == TRAINED_WITH_TOWER


@pytest.mark.parametrize("config", ["LlavaConfig", "Gemma3nConfig", "VoxtralConfig", "Qwen2VLConfig", "Idefics3Config"])
def test_other_checkpoints_with_a_tower_are_refused_in_one_line(config: str) -> None:
    kind = getattr(transformers, config)()
    with pytest.raises(ValueError, match=rf"^a checkpoint of type {kind.model_type} has a vision or audio tower") as error:
        build_model(kind)
    assert "\n" not in str(error.value)
