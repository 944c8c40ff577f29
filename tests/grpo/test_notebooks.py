"""A person at a prompt: what Ctrl-C in a run leaves, in a real interactive interpreter."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

SUPPORT = Path(__file__).resolve().parents[1] / "support"
CELL = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.path.insert(0, {support!r})
from pathlib import Path
from tiny_runs import ROWS, tiny_config
from rankup import GRPOTrainer

def slow(completion_ids, **kwargs):
    print("scoring", flush=True)
    time.sleep({seconds})
    return [sum(token < 130 for token in ids) / len(ids) for ids in completion_ids]

config = tiny_config(Path("run"), max_steps=40, eval_before=False)
trainer = GRPOTrainer(model={model!r}, reward_funcs=slow, args=config, train_dataset=ROWS, eval_dataset=ROWS[:4])
"""


class Prompt:
    """An interactive Python: what is typed into it, and what it prints."""

    def __init__(self, folder: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-i", "-q"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=folder,
        )

    def type(self, text: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(text + "\n")
        self.process.stdin.flush()

    def lines_until(self, word: str) -> list[str]:
        assert self.process.stdout is not None
        lines = []
        for line in self.process.stdout:
            lines.append(line.rstrip())
            if word in line:
                return lines
        raise AssertionError(f"the interpreter ended without {word!r}: {lines}")


@pytest.fixture
def prompt(tmp_path: Path) -> Iterator[Prompt]:
    made = Prompt(tmp_path)
    watchdog = threading.Timer(90, made.process.kill)
    watchdog.start()
    yield made
    watchdog.cancel()
    made.process.kill()
    made.process.wait()


def test_ctrl_c_saves_and_leaves_a_usable_interpreter(prompt: Prompt, tiny_model_path, tmp_path: Path):
    prompt.type(f"exec({CELL.format(support=str(SUPPORT), model=str(tiny_model_path('llama')), seconds=0.1)!r})")
    prompt.type("trainer.train()")
    prompt.lines_until(" 2/40")
    prompt.process.send_signal(signal.SIGINT)
    lines = prompt.lines_until("KeyboardInterrupt: ")
    assert any("SIGINT: finishing this step, then saving; Ctrl-C again stops now" in line for line in lines)
    assert "train(resume_from_checkpoint=True) continues the run from run/checkpoints/step_0000" in lines[-1]
    assert len(list((tmp_path / "run" / "checkpoints").iterdir())) == 1

    prompt.type("print('at', trainer.state.global_step, trainer.can_resume, trainer.evaluate()['eval_reward'] > 0)")
    *_, at = prompt.lines_until("at ")
    steps = int(at.split("at ")[1].split()[0])
    assert 2 <= steps < 40 and at.endswith("True True")
    prompt.type("trainer.train(resume_from_checkpoint=True)")
    prompt.lines_until(f" {steps + 2}/40")
    prompt.process.send_signal(signal.SIGINT)
    prompt.lines_until("KeyboardInterrupt")
    prompt.type("print('still', 'here')")
    prompt.lines_until("still here")


def test_a_second_ctrl_c_stops_at_once_and_leaves_a_usable_interpreter(prompt: Prompt, tiny_model_path):
    prompt.type(f"exec({CELL.format(support=str(SUPPORT), model=str(tiny_model_path('llama')), seconds=30)!r})")
    prompt.type("trainer.train()")
    prompt.lines_until("scoring")
    prompt.process.send_signal(signal.SIGINT)
    prompt.lines_until("Ctrl-C again stops now")
    prompt.process.send_signal(signal.SIGINT)
    prompt.lines_until("KeyboardInterrupt")
    prompt.type("print('still', 'here')")
    prompt.lines_until("still here")
