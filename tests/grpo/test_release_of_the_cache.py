"""Runs on vLLM with the KV cache released while training, and without."""

import pytest
from safetensors.torch import load_file
from tiny_runs import timeless
from transformers import TrainerCallback

pytestmark = pytest.mark.engine


class Watcher(TrainerCallback):
    """Notes the engine's state in the middle of each step; in the second one it samples there."""

    def __init__(self) -> None:
        self.trainer = None
        self.states: list[bool] = []
        self.texts: list[str] = []

    def on_optimizer_step(self, args, state, control, **kwargs):
        assert self.trainer is not None
        engine = self.trainer._sessions.current().engine
        self.states.append(engine.is_suspended)
        if len(self.states) == 2:
            self.texts += self.trainer.generate(["count to 3"], seed=1)
            assert not engine.is_suspended


def test_a_run_with_release_equals_one_without(make_trainer, engine_shelf, tmp_path):
    engine_shelf.close()  # one vLLM in a process

    def trained(name: str, *, releases: bool | None):
        watcher = Watcher()
        trainer = make_trainer(
            output_dir=tmp_path / name,
            engine="vllm",
            max_steps=3,
            eval_steps=1,
            release_kv_cache=releases,
            callbacks=[watcher],
        )
        watcher.trainer = trainer
        trainer.train()
        trainer.close()
        assert watcher.states == [True] * 3
        adapter = load_file(tmp_path / name / "adapter" / "adapter_model.safetensors")
        return watcher.texts, timeless(tmp_path / name), {name: weight.tolist() for name, weight in adapter.items()}

    assert trained("released", releases=None) == trained("kept", releases=False)
