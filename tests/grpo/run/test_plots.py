import json
import math
import struct
import sys
from pathlib import Path

import pytest

from rankup.grpo.run.plots import plot_learning_curve, running_mean
from rankup.grpo.run.records import RunRecorder


def make_run(folder: Path, *, seed: int, rewards: list[float], evaluations: bool = True) -> Path:
    recorder = RunRecorder(folder, config_yaml=f"seed: {seed}\nmodel: {{name: tiny}}\nlogging: {{run_name: sums}}\n")
    if evaluations:
        recorder.evaluation(0, {"eval_reward": 0.1}, when="before")
    for step, reward in enumerate(rewards, start=1):
        recorder.step(step, {"reward": reward})
    if evaluations:
        recorder.evaluation(len(rewards), {"eval_reward": 0.9}, when="after")
    recorder.close()
    return folder


def drawn_texts(monkeypatch, run_dirs: list[Path], out: Path) -> set[str]:
    """All text in the figure when it is saved."""
    from matplotlib.figure import Figure
    from matplotlib.text import Text

    texts: set[str] = set()
    save = Figure.savefig

    def save_and_look(figure: Figure, path: Path) -> None:
        save(figure, path)
        texts.update(text.get_text() for text in figure.findobj(Text))

    monkeypatch.setattr(Figure, "savefig", save_and_look)
    plot_learning_curve(run_dirs, out)
    return texts


def test_the_picture_has_the_documented_size(tmp_path):
    out = tmp_path / "learning_curve.png"
    plot_learning_curve([make_run(tmp_path / "run", seed=1, rewards=[0.1, 0.4, 0.8])], out)
    header = out.read_bytes()[:24]
    assert header.startswith(b"\x89PNG")
    assert struct.unpack(">II", header[16:24]) == (1600, 900)


def test_one_run_shows_name_setting_and_evaluations(tmp_path, monkeypatch):
    run = make_run(tmp_path / "run", seed=1, rewards=[0.02 * step for step in range(40)])
    texts = drawn_texts(monkeypatch, [run], tmp_path / "curve.png")
    expected = {"sums", "tiny", "0.10", "0.90", "each step", "mean of 4 steps", "evaluation", "mean reward"}
    assert expected <= texts


def test_several_runs_are_labelled_by_their_seeds(tmp_path, monkeypatch):
    runs = [make_run(tmp_path / f"run{seed}", seed=seed, rewards=[0.1, 0.5, 0.9]) for seed in (1, 2, 3)]
    assert {"seed 1", "seed 2", "seed 3"} <= drawn_texts(monkeypatch, runs, tmp_path / "curve.png")


def test_a_curve_is_drawn_without_steps_that_have_no_finite_reward(tmp_path):
    run = make_run(tmp_path / "run", seed=1, rewards=[float("nan"), -3.5, 12.0], evaluations=False)
    plot_learning_curve([run], tmp_path / "curve.png")
    assert (tmp_path / "curve.png").stat().st_size > 0


def test_a_run_without_a_step_is_refused(tmp_path):
    run = make_run(tmp_path / "run", seed=1, rewards=[])
    with pytest.raises(ValueError, match="no step with a reward"):
        plot_learning_curve([run], tmp_path / "curve.png")
    assert not (tmp_path / "curve.png").exists()


def test_drawing_does_not_import_pyplot(tmp_path):
    loaded_before = "matplotlib.pyplot" in sys.modules
    plot_learning_curve([make_run(tmp_path / "run", seed=1, rewards=[0.5])], tmp_path / "curve.png")
    assert ("matplotlib.pyplot" in sys.modules) == loaded_before


def test_the_running_mean_uses_earlier_values_only():
    assert running_mean([1.0, 3.0, 5.0, 7.0], 2) == [1.0, 2.0, 4.0, 6.0]


def test_a_step_without_a_reward_is_a_gap(tmp_path):
    assert running_mean([1.0, math.nan, 3.0], 2)[::2] == [1.0, 3.0] and math.isnan(running_mean([1.0, math.nan], 2)[1])
    rows = [{"step": 1, "reward": 0.5}, {"step": 2, "reward": None}, {"step": 3, "reward": 0.7}, {"step": 4, "reward": None}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "config.yaml").write_text("{}\n")
    plot_learning_curve([tmp_path], tmp_path / "curve.png")
    assert (tmp_path / "curve.png").is_file()
