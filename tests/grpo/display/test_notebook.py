"""The view of a run in a notebook, in a real kernel, with runs of a tiny model."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from jupyter_kernel import Kernel, Outputs

pytestmark = [pytest.mark.slow, pytest.mark.runs]

SUPPORT = Path(__file__).resolve().parents[2] / "support"
START = """
import sys
sys.path.insert(0, {support!r})
from pathlib import Path
from tiny_runs import ROWS, many_low_ids, tiny_config
from rankup import GRPOTrainer

def make(name, reward=many_low_ids, **changes):
    return GRPOTrainer(
        model={model!r}, reward_funcs=reward, args=tiny_config(Path(name), completions_steps=1, **changes),
        train_dataset=ROWS, eval_dataset=ROWS[:4],
    )
"""
FAILS_AT_STEP_2 = """
def bad(completions, trainer_state, **kwargs):
    return [1.0 / (1 - trainer_state.global_step)] * len(completions)
"""
VIEW = """
from pathlib import Path
from rankup.grpo.display.choose import make_view
view = make_view(max_steps={steps}, run_name="sums", output_dir=Path("runs/sums"))
"""


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory, tiny_model_path: Callable[[str], Path]) -> Iterator[Kernel]:
    with Kernel(tmp_path_factory.mktemp("notebook")) as started:
        outputs = started.run(START.format(support=str(SUPPORT), model=str(tiny_model_path("llama"))))
        assert outputs == Outputs()
        yield started


def step_shown(html: str) -> int:
    """The number of steps done; -1 in what is not a run."""
    found = re.search(r"step (\d+) of \d+", html)
    return -1 if found is None else int(found[1])


def test_a_run_is_one_output_that_is_updated_in_place(kernel: Kernel):
    outputs = kernel.run("trainer = make('run', max_steps=3, eval_steps=1)\noutput = trainer.train()")
    assert outputs.error is None and outputs.streams == {}
    (updates,) = outputs.displays.values()
    assert len(updates) > 1 and "\x1b" not in outputs.everything
    for text in (
        ">run</b>",
        "done · step 3 of 3",
        "<svg",
        "completions of step 3",
        "count to ",
        "note: base weights",
        "output: run",
    ):
        assert text in outputs.html, text
    assert outputs.html.count("note: base weights") == 1
    assert re.findall(r"<th[^>]*>step (\d)</th>", outputs.html) == ["0", "1", "2", "3"], "each evaluation once"
    assert updates[-1]["text/plain"].startswith("run: done, step 3/3, reward 0.")


def test_a_trainer_shows_itself(kernel: Kernel):
    (untrained,) = kernel.run("other = make('itself')\nother").results
    assert "not trained · step 0 of 2" in untrained["text/html"] and "<svg" not in untrained["text/html"]
    outputs = kernel.run("_ = other.train()\nother")
    (trained,) = outputs.results
    assert trained["text/plain"].startswith("<GRPOTrainer itself: done, step 2/2, reward 0.")
    for text in ("done · step 2 of 2", "<svg", "LoRA rank 8, alpha 16", "output: itself"):
        assert text in trained["text/html"], text


def test_a_second_run_has_an_output_of_its_own(kernel: Kernel):
    first = kernel.run("again = make('again')\n_ = again.train()")
    second = kernel.run("_ = again.train()")
    assert first.displays.keys().isdisjoint(second.displays)
    assert "step 2 of 2" in second.html and "note: the run that was in again is now in again.1" in second.html
    assert re.findall(r"<th[^>]*>step (\d)</th>", second.html) == ["0", "2"], "nothing of the first run"
    of_another = kernel.run("_ = make('another', max_steps=1).train()")
    assert of_another.error is None and "step 1 of 1" in of_another.html


def test_an_interrupted_run_says_so_and_can_be_resumed(kernel: Kernel):
    kernel.run("long = make('long', max_steps=2000)")
    outputs = kernel.run("long.train()", interrupt_when=lambda html: step_shown(html) >= 2)
    assert outputs.error is not None and outputs.error[0] == "KeyboardInterrupt"
    assert "train(resume_from_checkpoint=True) continues the run from long/checkpoints/step_" in outputs.error[1]
    done = step_shown(outputs.html)
    assert 2 <= done < 2000 and ">long</b> interrupted · step" in outputs.html
    assert "note: SIGINT: finishing this step, then saving; Ctrl-C again stops now" in outputs.html
    assert "continues" in kernel.run("long").results[0]["text/html"]

    resume = "long.train(resume_from_checkpoint=True)"
    resumed = kernel.run(resume, interrupt_when=lambda html: step_shown(html) > done)
    assert f"note: resuming after step {done}" in resumed.html and step_shown(resumed.html) > done
    assert kernel.run("long.evaluate()['eval_reward'] > 0").results == [{"text/plain": "True"}]


def test_a_run_that_fails_says_so(kernel: Kernel):
    kernel.run(FAILS_AT_STEP_2)
    outputs = kernel.run("failing = make('failing', bad, eval_before=False)\nfailing.train()")
    assert outputs.error is not None
    assert ">failing</b> stopped by an error · step 1 of 2" in outputs.html
    assert (
        "stopped, train(resume_from_checkpoint=True) continues · step 1 of 2" in kernel.run("failing").results[0]["text/html"]
    )


def test_quick_steps_are_few_updates(kernel: Kernel):
    code = VIEW.format(steps=1000) + (
        "import time\nstarted = time.monotonic()\n"
        "with view:\n    for step in range(1, 1001):\n        view.step(step, {'reward': step / 1000}, {'train': 0.01})\n"
        "time.monotonic() - started"
    )
    outputs = kernel.run(code)
    (updates,) = outputs.displays.values()
    seconds = float(outputs.results[0]["text/plain"])
    assert step_shown(outputs.html) == 1000
    assert len(updates) <= 3 + seconds / 0.5


def test_what_changes_right_after_an_update_is_shown_without_another_step(kernel: Kernel):
    """The last update is shown before the long evaluation that follows it, not after it."""
    code = VIEW.format(steps=3) + (
        "import threading\nwith view:\n    view.step(1, {'reward': 0.5}, {'train': 0.01})\n"
        "    view.stage('evaluating 8 prompts')\n    threading.Event().wait(60)\n"
    )
    outputs = kernel.run(code, interrupt_when=lambda html: "evaluating 8 prompts" in html)
    assert outputs.error is not None and outputs.error[0] == "KeyboardInterrupt"


def test_data_that_is_read_before_a_run_is_a_line_of_text(kernel: Kernel):
    outputs = kernel.run(VIEW.format(steps=3) + "view.stage('reading train.jsonl')")
    assert outputs == Outputs(streams={"stdout": "reading train.jsonl ...\n"})


def test_ipython_in_a_terminal_is_no_notebook():
    code = "from rankup.grpo.display.choose import make_view; print(type(make_view(max_steps=1, run_name='x')).__name__)"
    command = [sys.executable, "-m", "IPython", "--quick", "--no-banner", "--colors=NoColor", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines()[-1:] == ["PlainView"], done.stderr
