"""Episodes on a real Ray cluster: two workers, each with environments and tools of its own, make the run of one.

Starting the workers takes far longer than the steps, so each run shows several things.
"""

from __future__ import annotations

import json
import os
import runpy
import shutil
import string
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from clusters import ClusterRun, write_run_file
from safetensors.torch import load_file
from tiny_runs import timeless

from rankup import GRPOConfig, GRPOTrainer
from rankup.grpo.cli.main import main
from rankup.grpo.run.completions import read_completions

LETTERS = [*string.ascii_letters, *string.digits, *" .,:-"]
"""A random model writes one of these soon: so its turns end."""

WORLDS = '''
import os, random
from pathlib import Path


class Noisy:
    """Answers with random words, from the generators of the process. Rows from `limit` on have no world."""

    def __init__(self):
        Path(f"made_{os.environ.get('RANK', 'here')}").touch()
        random.seed(0)

    def reset(self, target, limit, seed):
        if target >= limit:
            raise RuntimeError(f"no world for {target}")
        self.said = 0
        return f" ({random.randint(0, 9)}, {seed})"

    def respond(self, text):
        random.seed(len(text))
        self.said += 1
        return f"{random.choice(['more', 'less', 'again'])} {random.randint(0, 99)}"

    @property
    def done(self):
        return self.said == 3

    def get_reward(self):
        return {"said": self.said + random.random()}

    def look_up(self, word: str) -> str:
        """Look up a word.

        Args:
            word: The word.
        """
        return word


def add(a: int, b: int) -> int:
    """Add two integers.

    Args:
        a: The first one.
        b: The second one.
    """
    return a + b
'''

OPTIONS: dict[str, Any] = {
    "num_generations": 4,
    "max_prompt_length": 1200,
    "max_completion_length": 64,
    "max_turn_length": 8,
    "stop": LETTERS,
}

pytestmark = [pytest.mark.slow, pytest.mark.ray]


@pytest.fixture(scope="module")
def model(tiny_model_path, tmp_path_factory) -> Path:
    """One with a context for prompts with tools."""
    folder = shutil.copytree(tiny_model_path("llama"), tmp_path_factory.mktemp("long") / "model")
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "max_position_embeddings": 2048}))
    return folder


@pytest.fixture(scope="module")
def cluster() -> Iterator[dict[str, str]]:
    """The environment variables with which a run joins a cluster of two nodes besides the head."""
    from ray.cluster_utils import Cluster

    node: dict[str, Any] = {"num_cpus": 1, "object_store_memory": 100 * 2**20}
    nodes = Cluster(initialize_head=True, head_node_args={**node, "num_cpus": 0, "include_dashboard": False})
    for _ in range(2):
        nodes.add_node(**node)
    yield {"RAY_ADDRESS": str(nodes.address)}
    nodes.shutdown()


def rows(limits: dict[int, int]) -> list[dict[str, Any]]:
    """Twelve conversations; `limits`: by row, other ones than none."""
    prompts = [[{"role": "user", "content": f"count to {target}"}] for target in range(12)]
    return [{"prompt": one, "target": target, "limit": limits.get(target, 99)} for target, one in enumerate(prompts)]


def adapter_of(run: Path) -> dict[str, Any]:
    return load_file(run / "adapter" / "adapter_model.safetensors")


def assert_same_run(one: Path, two: Path) -> None:
    """The same metrics of every step, and adapters that differ by rounding, which Adam amplifies where gradients are near 0."""
    a, b = adapter_of(one), adapter_of(two)
    distance = sum(((a[name] - b[name]) ** 2).sum().item() for name in a) ** 0.5
    assert distance / sum((a[name] ** 2).sum().item() for name in a) ** 0.5 < 1e-4
    for mine, theirs in zip(timeless(one), timeless(two), strict=True):
        shared = {name for name in mine.keys() & theirs.keys() if not name.startswith("packing/")}  # each worker has its packs
        assert {"rewards/said/mean", "tools/call_frequency", "episodes/failed", "episodes/mean_given_tokens"} <= shared or (
            "reward" not in mine
        )
        assert {name: theirs[name] for name in shared} == pytest.approx(
            {name: mine[name] for name in shared}, rel=1e-3, abs=1e-5, nan_ok=True
        )


def test_two_workers_play_the_episodes_of_one_and_stop_alike_when_most_are_void(
    tmp_path: Path, model: Path, cluster: dict[str, str]
) -> None:
    """From files beside the run file. Row 3, of worker 1, has no world in the first step; rows 8, 10 and 11 have none in the
    third, of which worker 0 has one of two: half of its episodes, and three quarters of all."""
    folder = tmp_path / "there"
    write_run_file(
        folder,
        model,
        rollout={**OPTIONS, "environment": "worlds.py:Noisy", "tools": "worlds.py:add"},
        optim={"prompts_per_step": 4, "max_steps": 4},
        rewards={"functions": []},
        data={"eval": None, "shuffle": False},
        logging={"eval_steps": 0, "completions_steps": 1},
    )
    (folder / "worlds.py").write_text(WORLDS)
    data = rows({3: 3, 8: 8, 10: 10, 11: 11})
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in data))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(["train", "run.yaml", "logging.output_dir=runs/one"]) == 1
    two = ClusterRun(folder, ("cluster.workers=2",), cluster)
    assert two.wait() == 1, two.output

    assert_same_run(folder / "runs" / "one", two.output_dir)
    assert {path.name for path in folder.glob("made_*")} == {"made_here", "made_0", "made_1"}
    assert "step 1: 4 of 16 episodes are void, since their environment failed: Noisy.reset failed" in two.output
    assert "raise RuntimeError" in two.output and "no world for 3" in two.output, "the traceback comes from worker 1"
    assert "12 of 16 episodes are void" in two.output and "no world for 11" in two.output
    assert "restarting all workers" not in two.output
    assert (two.output_dir / "checkpoints" / "step_000003").is_dir()
    saved = [read_completions(run / "completions" / "step_000002.parquet") for run in (folder / "runs" / "one", two.output_dir)]
    assert [row["completion"] for row in saved[1]] == [row["completion"] for row in saved[0]][: len(saved[1])]


SCRIPT = (
    WORLDS
    + """
import json, sys
from rankup import GRPOConfig, GRPOTrainer

def times_ten(environments, **kwargs):
    return [world.said * 10.0 for world in environments]

if __name__ == "__main__":
    model, workers, rows, options = sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3]), json.loads(sys.argv[4])
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=times_ten,
        args=GRPOConfig(
            dtype="float32", rank=8, alpha=16, prompts_per_step=4, max_steps=2, learning_rate=1e-2, engine="torch",
            eval_before=False, output_dir=f"runs/{workers}", workers=workers, max_failures=0, **options,
        ),
        train_dataset=rows,
        eval_dataset=rows[:4],
        tools=[add],
        environment_factory={"one": Noisy, "two": lambda: Noisy()},
    )
    trainer.train()
    tools = {tool.name for tool in trainer.setup.episodes.actions.tools}
    print("tools:", tools, "updates:", trainer.state.global_step)
"""
)


def test_tools_and_environments_of_a_script_are_sent_to_the_workers(
    tmp_path: Path, model: Path, cluster: dict[str, str]
) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    data = [{**row, "environment": ("one", "two")[place % 2]} for place, row in enumerate(rows({}))]
    arguments = [json.dumps(data), json.dumps(OPTIONS)]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        patch.setattr(sys, "argv", ["script.py", str(model), "1", *arguments])
        runpy.run_path("script.py", run_name="__main__")
    command = [sys.executable, "script.py", str(model), "2", *arguments]
    result = subprocess.run(command, cwd=tmp_path, env=os.environ | cluster, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.endswith("tools: {'add'} updates: 2\n")
    assert_same_run(tmp_path / "runs" / "1", tmp_path / "runs" / "2")
    inputs = [json.loads((tmp_path / "runs" / one / "summary.json").read_text())["inputs"] for one in ("1", "2")]
    assert inputs[0] == inputs[1], "code of a script has the same hash on a worker"
    assert {"made_0", "made_1"} <= {path.name for path in tmp_path.glob("made_*")}


def test_a_rollout_func_is_refused_before_any_worker_starts(tmp_path: Path, model: Path) -> None:
    config = GRPOConfig(engine="torch", workers=2, output_dir=tmp_path / "run")
    with pytest.raises(ValueError, match=r"rollout_func: gets the trainer.*set cluster.workers=1"):
        GRPOTrainer(
            model=str(model),
            reward_funcs=lambda completions, **kwargs: [0.0] * len(completions),
            args=config,
            train_dataset=rows({}),
            rollout_func=lambda prompts, trainer: {},
        )
