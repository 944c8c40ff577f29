"""The public names and signatures, which users rely on. A change here belongs into CHANGELOG.md."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest

import rankup

ROOT = Path(__file__).resolve().parents[2]

NAMES = ["Completion", "GRPOConfig", "GRPOTrainer", "Group", "LossInputs", "Prompt", "RunInterrupted", "__version__"]

TRAINER = {
    "__init__": (
        "(self, model=None, reward_funcs=None, args=None, train_dataset=None, eval_dataset=None, processing_class=None, "
        "reward_processing_classes=None, callbacks=None, optimizers=(None, None), quantization_config=None, peft_config=None, "
        "tools=None, rollout_func=None, environment_factory=None, *, eval_reward_funcs=None, view=None)"
    ),
    "train": "(self, resume_from_checkpoint=None, *, allow_changes=False, engine=None)",
    "evaluate": "(self, eval_dataset=None, *, adapter=None, output_file=None)",
    "generate": "(self, prompts, *, temperature=None, max_completion_length=None, seed=None)",
    "generate_rollout_completions": "(self, prompts, *, temperature=None, max_completion_length=None, seed=None)",
    "save_model": "(self, output_dir=None)",
    "push_to_hub": "(self, commit_message='End of training', *, repo_id=None, private=None, token=None)",
    "log": "(self, logs)",
    "add_callback": "(self, callback)",
    "remove_callback": "(self, callback)",
    "close": "(self)",
    "end": "(self)",
    "__enter__": "(self)",
    "__exit__": "(self, *error)",
    "log_metrics": "(self, split, metrics)",
    "save_metrics": "(self, split, metrics, combined=True)",
    "save_state": "(self)",
    "is_world_process_zero": "(self)",
    "is_local_process_zero": "(self)",
}
PROPERTIES = {"state", "model", "processing_class", "can_resume", "accelerator"}
ATTRIBUTES = {"args", "summary", "setup", "view"}

SECTIONS = [
    "model", "lora", "rollout", "algorithm", "correction", "guards", "optim", "rewards", "data", "logging", "checkpoint",
    "cluster", "seed", "deterministic",
]  # fmt: skip
CONFIG = {"notes", "has_trl_batch", "completions_per_step", "max_num_seqs", "to_dict", "to_json_string"}

FIELDS = {
    "Completion": [
        "token_ids", "logprobs", "text", "finish_reason", "policy_version", "given", "episode", "omitted_tokens",
        "omitted_given", "routed_experts",
    ],
    "Group": [
        "prompt", "completions", "scores", "advantages", "reward_std", "has_variance", "passes_filter", "is_local",
    ],
    "LossInputs": ["logprobs", "entropies", "old_logprobs", "sampler_logprobs", "advantages", "sequence", "lengths"],
    "Prompt": ["content", "token_ids", "columns", "eval_set", "completion_prefix", "row", "is_from_reset"],
}  # fmt: skip


def signature(function: Any) -> str:
    """Names and defaults, without types."""
    parameters = inspect.signature(function).parameters.values()
    bare = [parameter.replace(annotation=inspect.Parameter.empty) for parameter in parameters]
    return str(inspect.Signature(bare))


def public(names: Any) -> set[str]:
    return {name for name in names if not name.startswith("_")}


def test_the_package_has_these_names():
    assert rankup.__all__ == NAMES
    assert all(hasattr(rankup, name) for name in NAMES)


@pytest.mark.parametrize("name", TRAINER)
def test_a_method_of_the_trainer_has_this_signature(name: str):
    assert signature(getattr(rankup.GRPOTrainer, name)) == TRAINER[name]


def test_the_trainer_has_no_other_public_names(make_trainer: Any):
    trainer = make_trainer()
    methods = {name for name in TRAINER if not name.startswith("__")}
    assert public(dir(rankup.GRPOTrainer)) == methods | PROPERTIES
    assert public(vars(trainer)) == ATTRIBUTES


def test_the_configuration_has_these_sections():
    of_pydantic = public(dir(rankup.GRPOConfig.__base__))
    assert list(rankup.GRPOConfig.model_fields) == SECTIONS
    assert public(dir(rankup.GRPOConfig)) - of_pydantic == CONFIG


@pytest.mark.parametrize("name", FIELDS)
def test_a_type_that_functions_get_has_these_fields(name: str):
    assert list(inspect.get_annotations(getattr(rankup, name))) == FIELDS[name]


def test_the_changelog_begins_with_what_comes_next():
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert text.startswith("# Changelog\n") and "\n## Unreleased\n" in text
