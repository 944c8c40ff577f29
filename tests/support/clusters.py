"""Runs on a Ray cluster of several nodes on this machine, which a test can stop at a step, disturb, and let continue."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

REWARD = '''
import json, os, time
from pathlib import Path

HERE = Path(__file__).parent


def drift():
    """Another adapter in this process, by one number."""
    import gc, torch
    from rankup.grpo.model.policy import Policy

    policy = next(thing for thing in gc.get_objects() if isinstance(thing, Policy))
    with torch.no_grad():
        policy.masters[0].view(-1)[0] += 1e-6


def many_low_ids(completions, completion_ids, target, trainer_state, log_metric, **kwargs):
    """The share of token ids in the lower half of the vocabulary. In training, at a step that has a file `stop_<step>` here,
    says which process this is, and waits until the file is gone; with `drift_<step>`, worker 1 drifts."""
    step, rank = trainer_state.global_step, os.environ.get("RANK", "0")
    if (HERE / f"stop_{step}").exists() and len(completions) > 1:
        mark = HERE / f".{step}_{rank}"
        mark.write_text(json.dumps({"worker": os.getpid(), "node": int(os.environ["RAY_RAYLET_PID"])}))
        mark.rename(HERE / f"at_{step}_{rank}")
        while (HERE / f"stop_{step}").exists():
            time.sleep(0.05)
    if (HERE / f"drift_{step}").exists() and rank == "1":
        drift()
    log_metric("targets", sum(target))
    return [sum(token < 130 for token in ids) / len(ids) for ids in completion_ids]
'''

OPTIONS: dict[str, Any] = {
    "model": {"dtype": "float32"},
    "lora": {"rank": 8, "alpha": 16},
    "rollout": {
        "engine": "torch",
        "num_generations": 4,
        "max_prompt_length": 64,
        "max_completion_length": 8,
        "kv_cache_gib": 0.0625,  # with vLLM
    },
    "algorithm": {"scale_rewards": "batch"},
    "optim": {"prompts_per_step": 3, "max_steps": 5, "learning_rate": 1e-2},
    "rewards": {"functions": "reward.py:many_low_ids"},
    "data": {"train": "rows.jsonl", "eval": "rows.jsonl"},
    "logging": {"eval_steps": 2},
    "checkpoint": {"save_steps": 1, "keep_last": 10},
}


def write_run_file(folder: Path, model: Path, **changes: Any) -> Path:
    """`run.yaml` with its reward function and data, in a separate folder; `changes` are of a section each."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "reward.py").write_text(REWARD)
    rows = [{"prompt": f"count to {n}", "target": n} for n in range(12)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = {section: {**OPTIONS.get(section, {}), **changes.get(section, {})} for section in {*OPTIONS, *changes}}
    values["model"]["name"] = str(model)
    (folder / "run.yaml").write_text(yaml.safe_dump(values))
    return folder / "run.yaml"


@dataclass
class ClusterRun:
    """`rankup train` of a folder's run file, as a process. Its output goes to a file."""

    folder: Path
    overrides: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.output_dir = self.folder / "runs" / "run"
        self._log = self.folder / "output.log"
        code = "import sys; from rankup.grpo.cli.main import main; sys.exit(main(sys.argv[1:]))"
        command = [sys.executable, "-c", code, "train", "run.yaml", "logging.output_dir=runs/run", *self.overrides]
        with self._log.open("ab") as log:
            environment = {**os.environ, **self.environment}
            self.process = subprocess.Popen(
                command, cwd=self.folder, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True
            )

    @property
    def output(self) -> str:
        """All that was printed in this folder so far."""
        return self._log.read_text()

    def wait(self, *, timeout: float = 600) -> int:
        """The exit status."""
        return self.process.wait(timeout)

    def until_stopped_at(self, step: int, *, workers: int = 2) -> list[dict[str, int]]:
        """Process and node (by its raylet's process) of each worker, once all of them wait at the step."""
        marks = [self.folder / f"at_{step}_{rank}" for rank in range(workers)]
        wait_until(lambda: all(mark.exists() for mark in marks) or self.process.poll() is not None)
        assert self.process.poll() is None, self.output
        return [json.loads(mark.read_text()) for mark in marks]

    def let_continue(self, step: int) -> None:
        """Past the step where it waits."""
        (self.folder / f"stop_{step}").unlink()


def wait_until(holds: Callable[[], object], *, timeout: float = 300) -> None:
    """Look until it holds."""
    deadline = time.monotonic() + timeout
    while not holds():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def is_alive(pid: int) -> bool:
    """Whether there is such a process, and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
