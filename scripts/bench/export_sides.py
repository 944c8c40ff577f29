"""The engine of `export_agreement.py`, in a process of its own: with the run's adapter, or on the merged model without one."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from transformers import AutoTokenizer

from rankup.grpo.common.model_files import resolve_model
from rankup.grpo.common.quiet import quiet_stderr
from rankup.grpo.config import load_config
from rankup.grpo.data.prompts import prepare_prompts
from rankup.grpo.data.sources import load_rows
from rankup.grpo.experience.collect import engine_settings
from rankup.grpo.model.policy import Policy
from rankup.grpo.run.records import CONFIG_FILE
from rankup.rollout.engine import RolloutEngine


class GreedySide:
    """An engine in fp32. `merged`: a model folder to sample from instead of the run's base and adapter."""

    def __init__(self, *, run: Path, merged: Path | None, rows: int | None) -> None:
        config = load_config(run / CONFIG_FILE, ["model.dtype=float32"])
        model_path = resolve_model(config.model.name, revision=config.model.revision)
        assert config.data.eval is not None, "the run has no evaluation data"
        data = load_rows(config.data.eval, split=config.data.eval_split, subset=config.data.subset, base_dir=config.base_dir)
        self._prompts = prepare_prompts(
            data[:rows],
            AutoTokenizer.from_pretrained(merged or model_path),
            prompt_column=config.data.prompt_column,
            system_prompt=config.data.system_prompt,
            max_prompt_length=config.rollout.max_prompt_length,
            chat_template_kwargs=config.data.chat_template_kwargs,
        ).rows
        self._sampling = config.rollout.greedy()
        self._use_adapter = merged is None
        settings = engine_settings(config, model_path)
        with quiet_stderr():
            self._engine = RolloutEngine(dataclasses.replace(settings, model=str(merged or model_path)))
            if merged is None:
                policy = Policy(model_path, lora=config.lora, dtype="float32", device=self._engine.device)
                policy.load_adapter(run / "adapter")
                policy.attach(self._engine.slots)
                self._engine.publish(policy.write_slots)

    def completions(self, *, of_base: bool = False) -> list[tuple[int, ...]]:
        """Token ids of the greedy completion of each prompt, in the prompts' order. `of_base`: without the adapter."""
        prompts = [row.token_ids for row in self._prompts]
        groups = self._engine.rollout(prompts, self._sampling, use_adapter=self._use_adapter and not of_base)
        return [group.completions[0].token_ids for group in sorted(groups, key=lambda group: group.index)]
