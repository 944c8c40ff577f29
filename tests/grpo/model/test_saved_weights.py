"""Weights of checkpoints with a vision tower: found under the names that published ones have, and the tower is not read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from families import FAMILIES, make_family
from family_checks import stock_class

from rankup.grpo.common.quiet import quiet_stderr
from rankup.grpo.common.weight_files import files_of_weights
from rankup.grpo.model.base_model import empty_model, load_base, nf4_names
from rankup.grpo.model.saved_weights import saved_weights

pytestmark = pytest.mark.slow

WITH_TOWER = [name for name, family in FAMILIES.items() if family.tower is not None]
OLD_NAMES = {
    "gemma3-vision": "language_model.model.",
    "mistral3": "language_model.model.",
    "mistral3-ministral3": "language_model.model.",
    "qwen2.5-vl": "model.",
}
"""Where the files of these have the layers that transformers calls `model.language_model.layers`."""


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A function from a family to the folder of a tiny model."""
    made: dict[str, Path] = {}

    def folder(family: str) -> Path:
        if family not in made:
            with quiet_stderr():
                made[family] = make_family(tmp_path_factory.mktemp("vision") / family, family)
        return made[family]

    return folder


@pytest.mark.parametrize("family", WITH_TOWER)
def test_every_weight_of_the_text_part_is_found_and_none_of_the_tower(folder_of: Callable[[str], Path], family: str) -> None:
    files = files_of_weights(folder_of(family))
    model = empty_model(str(folder_of(family)), torch.float32, files)
    saved = saved_weights(model, files)
    assert {name for name, _ in model.named_parameters()} <= saved.keys.keys() <= model.state_dict().keys()
    before = OLD_NAMES.get(family, "model.language_model.")
    assert saved.keys["model.language_model.layers.1.mlp.down_proj.weight"] == f"{before}layers.1.mlp.down_proj.weight"


@pytest.mark.parametrize("family", WITH_TOWER)
def test_the_text_part_is_loaded_as_transformers_loads_it(folder_of: Callable[[str], Path], family: str) -> None:
    base = load_base(str(folder_of(family)), dtype=torch.float32)
    with quiet_stderr():
        stock = dict(stock_class(folder_of(family)).from_pretrained(folder_of(family), dtype=torch.float32).named_parameters())
    assert all(torch.equal(weight, stock[name]) for name, weight in base.weights.items())
    assert base.unshared_bytes < sum(weight.nbytes for weight in stock.values()), "the tower is not held"


@pytest.mark.parametrize("family", ["gemma3-vision", "qwen3-vl"])
def test_layers_of_the_text_part_are_rounded_to_4_bits(folder_of: Callable[[str], Path], family: str) -> None:
    folder = folder_of(family)
    names = nf4_names(str(folder))
    assert len(names) == 14 and set(names) <= files_of_weights(folder).keys(), "the loader of vLLM knows names of the files"
    packed, plain = (load_base(str(folder), dtype=torch.float32, load_in=load_in) for load_in in ("nf4", None))
    assert packed.unshared_bytes < plain.unshared_bytes / 2
