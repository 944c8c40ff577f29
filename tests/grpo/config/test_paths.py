"""Names in a run file: files beside it are found from every working directory."""

from pathlib import Path

import pytest
import yaml

from rankup.grpo.common.model_files import resolve_adapter, resolve_model, resolve_tokenizer
from rankup.grpo.config import GRPOConfig, dump_config, load_config
from rankup.grpo.config.paths import resolve, resolve_data, resolve_files
from rankup.grpo.config.run_folders import function_of_run
from rankup.grpo.data.sources import load_rows
from rankup.rewards.loading import load_reward

RUN_FILE = """
data: {train: train.jsonl, eval: "make.py:rows", sampler: "make.py:sample"}
rewards: {functions: [reward.py:score, {function: package.module:score, weight: 0.5}, last_integer]}
algorithm: {advantage_estimator: "loss.py:advantages", group_filter: loss.py:keep, loss_type: loss.py:mine}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run file with its data, functions and loss beside it."""
    folder = tmp_path / "there"
    (folder / "package").mkdir(parents=True)
    for name in ("train.jsonl", "make.py", "reward.py", "loss.py", "package/module.py"):
        (folder / name).touch()
    (folder / "run.yaml").write_text(RUN_FILE)
    return folder


def names(config: GRPOConfig) -> list[object]:
    functions = [entry.function for entry in config.rewards.entries()]
    algorithm = config.algorithm
    own = [config.data.sampler, algorithm.advantage_estimator, algorithm.group_filter, algorithm.loss_type]
    return [config.data.train, config.data.eval, *functions, *map(str, own)]


def test_files_beside_the_run_file_get_their_path_from_the_working_directory(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder.parent)
    expected = ["there/train.jsonl", "there/make.py:rows", "there/reward.py:score", "there/package/module.py:score"]
    config = load_config("there/run.yaml")
    own = ["there/make.py:sample", "there/loss.py:advantages", "there/loss.py:keep", "there/loss.py:mine"]
    assert names(config) == [*expected, "last_integer", *own]
    (folder / "copy.yaml").write_text(dump_config(config))
    assert names(load_config("there/copy.yaml")) == names(config)


def test_they_get_an_absolute_path_if_they_are_elsewhere(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    config = load_config("../there/run.yaml")
    assert names(config)[0] == str(folder / "train.jsonl") and names(config)[-1] == f"{folder}/loss.py:mine"


def test_files_in_the_working_directory_take_precedence(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    assert names(load_config("run.yaml")) == names(GRPOConfig(**yaml.safe_load(RUN_FILE)))
    monkeypatch.chdir(folder.parent)
    Path("train.jsonl").touch()
    Path("package.py").touch()
    assert names(load_config("there/run.yaml"))[0] == "train.jsonl"
    assert names(load_config("there/run.yaml"))[3] == "package.module:score"


@pytest.mark.parametrize(
    "name",
    ["/absolute/train.jsonl", "missing.jsonl", "missing.py:f", "json.tool:main", "org/data", "reasoning_gym:sums", "dapo"],
)
def test_other_names_do_not_change(folder: Path, name: str) -> None:
    (folder / "json").mkdir()
    (folder / "json" / "tool.py").touch()  # the standard library's comes first, as in an import
    assert resolve(name, folder) == name


def test_the_user_folder_is_expanded_by_whoever_opens_the_file(folder: Path) -> None:
    assert resolve("~/train.jsonl", folder) == "~/train.jsonl"


EPISODES = """
rollout:
  tools: [tools.py:add, package.tools:find, math:sqrt]
  environment: {guess: worlds.py:Guess, far: openenv:http://host:8000, game: textarena:Wordle, taxi: gymnasium:Taxi-v3}
"""


@pytest.fixture
def episodes(tmp_path: Path) -> Path:
    """A run file with its tools and environments beside it, and files with the names of the prefixes."""
    folder = tmp_path / "there"
    (folder / "package").mkdir(parents=True)
    for name in ("tools.py", "package/tools.py", "worlds.py", "textarena.py", "openenv.py", "gymnasium.py"):
        (folder / name).touch()
    (folder / "run.yaml").write_text(EPISODES)
    return folder


def test_tools_and_environments_are_found_beside_the_run_file(episodes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(episodes.parent)
    rollout = load_config("there/run.yaml").rollout
    assert rollout.tools == ["there/tools.py:add", "there/package/tools.py:find", "math:sqrt"]
    libraries = {"far": "openenv:http://host:8000", "game": "textarena:Wordle", "taxi": "gymnasium:Taxi-v3"}
    assert rollout.environment == {"guess": "there/worlds.py:Guess", **libraries}
    (episodes / "run.yaml").write_text("{tools: tools.py:add, environment: worlds.py:Guess}")
    rollout = load_config("there/run.yaml").rollout
    assert (rollout.tools, rollout.environment) == (["there/tools.py:add"], "there/worlds.py:Guess")


def test_tools_and_environments_of_a_run_are_found_from_elsewhere(
    episodes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (episodes / "run.yaml").write_text(f"logging: {{working_dir: {episodes}}}\n{EPISODES}")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    rollout = load_config(episodes / "run.yaml").rollout
    assert rollout.tools == [f"{episodes}/tools.py:add", f"{episodes}/package/tools.py:find", "math:sqrt"]
    assert isinstance(rollout.environment, dict)
    assert rollout.environment["guess"] == f"{episodes}/worlds.py:Guess"
    assert rollout.environment["game"] == "textarena:Wordle"


def test_options_that_name_no_file_stay_unset(tmp_path: Path) -> None:
    """A derived default that counted as set would be kept under another objective."""
    (tmp_path / "run.yaml").write_text("algorithm: {loss_type: rloo}")
    config = load_config(tmp_path / "run.yaml")
    assert config.algorithm.model_fields_set == {"loss_type"} and config.algorithm.advantage_estimator == "rloo"


@pytest.mark.parametrize("place", ["there", "run[1]"])
def test_every_form_of_data_is_found_beside_the_run_file(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / place
    for name in ("ROWS.JSONL", "rows.ndjson", "parts/a.csv", "parts/b.csv", "set/train.jsonl"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("n\n7\n" if name.endswith("csv") else '{"n": "7"}\n')
    (folder / "run.yaml").write_text(
        "data: {train: [ROWS.JSONL, rows.ndjson, parts/*.csv], eval: {whole: set, more: [set/train.jsonl, './parts/?.csv']}}"
    )
    monkeypatch.chdir(tmp_path)
    data = load_config(folder / "run.yaml").data
    assert data.train is not None and isinstance(data.eval, dict)
    assert load_rows(data.train, split="train") == [{"n": "7"}] * 4
    if place == "there":  # `datasets` takes brackets in the name of a folder for a pattern
        assert load_rows(data.eval["whole"], split="train") == [{"n": "7"}]
    assert load_rows(data.eval["more"], split="test") == [{"n": "7"}] * 3


def test_data_elsewhere_or_nowhere_does_not_change(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    Path("near").mkdir()
    Path("near/rows.csv").touch()
    (folder / "near").mkdir()
    names = ["near", "near/*.csv", "org/data", "*.nowhere", "no.jsonl", "~/*.jsonl", "/no/*.csv", "s3://bucket/train.jsonl"]
    assert [resolve_data(name, folder) for name in names] == names
    assert resolve_data("make.py:rows", folder) == "there/make.py:rows"
    assert resolve("package", folder) == "package", "only data may be a folder"


@pytest.mark.parametrize("name", ["ĸ" * 300, "a/" * 3000 + "b", "a\0b"], ids=["long name", "long path", "null byte"])
def test_a_name_that_no_file_can_have_stays_as_it_is(tmp_path: Path, name: str) -> None:
    config = GRPOConfig(
        data={"train": [name, f"{name}.jsonl"], "eval": {"one": name}, "chat_template": name, "sampler": f"{name}:f"},
        rewards={"functions": [name, f"{name}.py:f", f"{name}:f"]},
        rollout={"tools": [name, f"{name}.py:f"], "environment": {"one": name, "two": f"{name}:f"}},
        model={"name": name, "tokenizer": name},
        lora={"start_from": name},
    )
    assert resolve_files(config, tmp_path) == config


@pytest.mark.parametrize("name", ["ĸ" * 300, "a/" * 3000 + "b", "a\0b"], ids=["long name", "long path", "null byte"])
def test_a_name_that_no_file_can_have_is_refused_wherever_files_are_read(tmp_path: Path, name: str) -> None:
    for source in (f"{name}.jsonl", f"./{name}", [f"{name}.csv"] * 2):
        with pytest.raises((ValueError, FileNotFoundError)):
            load_rows(source, split="train")
    for read in (resolve_model, resolve_adapter, resolve_tokenizer):
        with pytest.raises(ValueError, match="no such folder"):
            read(f"./{name}")
    with pytest.raises((ValueError, FileNotFoundError)):
        load_reward(f"{name}.py:score")
    with pytest.raises(FileNotFoundError, match="run file not found"):
        load_config(f"{name}.yaml")
    assert function_of_run(f"{name}.py:score", []) == f"{name}.py:score"
