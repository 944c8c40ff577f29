"""One process, several trainers: a closed, failed or replaced one gives its memory back."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import gc, json, sys
from pathlib import Path
from rankup import GRPOConfig, GRPOTrainer
from rankup.grpo.common.memory import resident_mib

other_model, engine = sys.argv[1:]
rows = [{"prompt": f"{n}+{n}=", "answer": 2 * n} for n in range(8)]
measured = {}

def length(completions, **kwargs):
    return [float(len(completion)) for completion in completions]

def fails(completions, trainer_state, **kwargs):
    if trainer_state.global_step == 1:
        raise ZeroDivisionError
    return length(completions)

def made(name, model="smollm2-135m-instruct", reward=length):
    config = GRPOConfig(
        output_dir=Path(name), engine=engine, dtype="float32", rank=64, num_generations=4, prompts_per_step=2, max_steps=2,
        max_prompt_length=16, max_completion_length=8, kv_cache_gib=0.125, eval_before=False,
    )
    return GRPOTrainer(model, reward, config, rows, rows[:2])

def use(trainer):
    trainer.train()
    trainer.generate(["1+1="])
    trainer.evaluate()
    trainer.save_model("saved")

def measure(phase):
    gc.collect()
    measured[phase] = resident_mib()

with made("warm-up") as trainer:
    use(trainer)
measure("closed")                   # libraries are loaded now, and caches of theirs are full
trainer = made("first")
use(trainer)
measure("open")
trainer.close()
measure("closed again")
trainer = made("first")             # stays open, and the next one takes its place
use(trainer)
second = made("second", model=other_model)
use(second)
second.close()
measure("second closed")
try:
    made("failing", reward=fails).train()
except RuntimeError as error:
    kept = error                    # as a notebook keeps the last error
measure("failed")
third = made("third")
use(third)
del third, trainer, second
measure("garbage")
print("measured", json.dumps(measured))
"""


RESTARTS = pytest.mark.xfail(reason="every start of vLLM leaves some 25 MiB: 7.5 % above after five of them", strict=True)


@pytest.mark.exhaustive
@pytest.mark.parametrize("engine", ["torch", pytest.param("vllm", marks=[pytest.mark.engine, RESTARTS])])
def test_memory_is_back_where_it_was_within_five_percent(engine: str, tiny_model_path, tmp_path: Path, engine_shelf):
    engine_shelf.close()
    command = [sys.executable, "-c", SCRIPT, str(tiny_model_path("qwen2")), engine]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stderr
    [line] = [line for line in result.stdout.splitlines() if line.startswith("measured")]
    measured = json.loads(line.removeprefix("measured"))
    assert measured["open"] > measured["closed"] + 400, "the test needs a model that takes memory"
    for phase in ("closed again", "second closed", "failed", "garbage"):
        assert measured[phase] < 1.05 * measured["closed"], (phase, measured)
