"""`rankup export --merge` of a checkpoint with a vision tower: the tower is in the result, as it was."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from families import make_family
from family_checks import stock_class
from peft import PeftModel
from safetensors.torch import load_file

from rankup import GRPOConfig
from rankup.grpo.cli.export.export import export_merged
from rankup.grpo.cli.export.model_card import read_run
from rankup.grpo.common.quiet import quiet_stderr
from rankup.grpo.config import LoraConfig, dump_config
from rankup.grpo.model.policy import Policy

pytestmark = pytest.mark.slow

TOKENS = torch.tensor([[1, 17, 99, 200, 4, 4, 31]])


@pytest.mark.parametrize("family", ["gemma3-vision", "qwen2.5-vl", "qwen3.5-vision"])
def test_the_text_part_is_merged_and_the_tower_is_copied(tmp_path: Path, family: str) -> None:
    base, run, merged = tmp_path / "base", tmp_path / "run", tmp_path / "merged"
    with quiet_stderr():
        make_family(base, family)
    (base / "preprocessor_config.json").write_text("{}")
    policy = Policy(str(base), lora=LoraConfig(rank=16, alpha=8), dtype="float32")
    with torch.no_grad():
        for n, master in enumerate(policy.masters):
            master.copy_(torch.randn(master.shape, generator=torch.Generator().manual_seed(n)) * 0.1)
    run.mkdir()
    policy.save_adapter(run / "adapter")
    (run / "config.yaml").write_text(dump_config(GRPOConfig(model=str(base), lora={"rank": 16, "alpha": 8})))  # type: ignore[arg-type]
    export_merged(read_run(run), merged, dtype="float32")

    before, after = (load_file(folder / "model.safetensors") for folder in (base, merged))
    assert before.keys() == after.keys(), "names of the checkpoint"
    changed = {name for name, weight in before.items() if not torch.equal(weight, after[name])}
    assert len(changed) == len(policy.layers) and not any("vis" in name for name in changed)
    assert (merged / "preprocessor_config.json").is_file()
    load = stock_class(base).from_pretrained
    with quiet_stderr(), torch.no_grad():
        of_peft = PeftModel.from_pretrained(load(base, dtype=torch.float32), str(run / "adapter"))(input_ids=TOKENS).logits
        of_merged = load(merged, dtype=torch.float32)(input_ids=TOKENS).logits
    torch.testing.assert_close(of_merged, of_peft, rtol=1e-4, atol=1e-4)
