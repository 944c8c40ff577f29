"""Run files and overrides: values, errors, and that a dump reads back."""

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from rankup.grpo.config import (
    DataConfig,
    GRPOConfig,
    LoggingConfig,
    LoraConfig,
    ModelConfig,
    OptimConfig,
    RewardsConfig,
    dump_config,
    load_config,
)

CONFIGS = Path(__file__).parents[3] / "configs"

Load = Callable[..., GRPOConfig]
ErrorOf = Callable[..., str]

# Shipped files


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_file_loads(path: Path) -> None:
    config = load_config(path)
    assert config.data.train and config.data.eval and (config.rewards.functions or config.rollout.environment)
    found = [config.data.train, config.data.eval, *(one.function for one in config.rewards.entries()), *config.rollout.tools]
    assert all(Path(name.rpartition(":")[0]).is_file() for name in found if ".py:" in name)  # tests start in the root


def test_quickstart_is_the_run_of_the_readme() -> None:
    config = load_config(CONFIGS / "quickstart.yaml")
    assert config.model.name == "smollm2-135m-instruct"
    assert (config.lora.rank, config.lora.scaling, config.lora.targets) == (64, 0.5, "all-linear")
    assert (config.optim.learning_rate, config.optim.lr_scheduler_type, config.optim.max_steps) == (2e-4, "linear", 130)
    assert (config.max_num_seqs, config.rollout.max_model_length) == (128, 88)
    assert config.logging.output_dir == Path("runs/quickstart")


# Run files


def test_empty_file_and_empty_sections_are_the_defaults(load: Load) -> None:
    expected = GRPOConfig(run_name="mine").model_dump()
    assert load("").model_dump() == expected
    assert load("# nothing\noptim:\nlora: {}\n").model_dump() == expected


@pytest.mark.parametrize(
    ("text", "value"), [("1e-4", 1e-4), ("1E-4", 1e-4), ("+2.e-5", 2e-5), ("5e+0", 5.0), (".5", 0.5), ("1", 1.0)]
)
def test_every_way_to_write_a_number(load: Load, text: str, value: float) -> None:
    assert load(f"optim: {{learning_rate: {text}}}").optim.learning_rate == value
    assert load("", f"optim.learning_rate={text}").optim.learning_rate == value
    assert load(f"data: {{options: {{x: {text}}}}}").data.options == {"x": value}  # not by coercion alone


@pytest.mark.parametrize(
    ("text", "value"),
    [("010", 10), ("08", 8), ("-007", -7), ("1_000", 1000), ("0x1F", 31), ("0b11", 3), ("0o17", 15), ("0", 0)],
)
def test_every_way_to_write_an_integer(load: Load, text: str, value: int) -> None:
    assert load("", f"data.options.x={text}").data.options == {"x": value}
    if value >= 0:
        assert load(f"seed: {text}").seed == value


@pytest.mark.parametrize("text", ["1:30", "0x", "0o8", "1:30:00.5"])
def test_what_is_no_number_is_text(load: Load, error_of: ErrorOf, text: str) -> None:
    assert load(f"data: {{options: {{x: {text}}}}}").data.options == {"x": text}
    assert error_of(f"seed: {text}") == f"seed: must be an integer (got {text!r})"
    assert error_of(f"optim: {{learning_rate: {text}}}") == f"optim.learning_rate: must be a number (got {text!r})"


@pytest.mark.parametrize("text", [".inf", "-.inf", ".nan", "1e999"])
def test_numbers_are_finite(error_of: ErrorOf, text: str) -> None:
    assert error_of(f"optim: {{learning_rate: {text}}}").startswith("optim.learning_rate: must be a finite number")


@pytest.mark.parametrize("name", ["..", "a/../../b", "/tmp/x", "."])
def test_a_name_does_not_lead_out_of_the_folder_of_runs(error_of: ErrorOf, name: str) -> None:
    message = f"logging: run_name must name a folder inside of runs (got {name!r}): set output_dir too"
    assert error_of("", f"run_name={name}") == message
    assert GRPOConfig(run_name=name, output_dir="here").logging.run_name == name


def test_the_home_folder_is_that_of_the_user(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert load("", "logging.output_dir=~/runs/mine").logging.output_dir == Path("/home/me/runs/mine")


def test_a_date_is_a_name(load: Load) -> None:
    assert load("logging: {run_name: 2025-01-31}").logging.output_dir == Path("runs/2025-01-31")
    assert load("", "logging.run_name=7").logging.run_name == "7"


def test_run_is_named_after_its_file_unless_it_has_a_name(load: Load) -> None:
    assert load().logging.run_name == "mine"
    assert load().logging.output_dir == Path("runs/mine")
    assert load("logging: {output_dir: here/there}").logging.run_name == "mine"
    assert load("logging: {output_dir: here/there}").logging.output_dir == Path("here/there")
    assert load("logging: {run_name: other, output_dir: null}").logging.output_dir == Path("runs/other")
    assert load("", "run_name=null").logging.run_name == "mine"


def test_name_and_folder_without_a_file() -> None:
    assert (GRPOConfig().logging.run_name, GRPOConfig().logging.output_dir) == ("run", Path("runs/run"))
    assert GRPOConfig(output_dir="here/there").logging.run_name == "there"
    assert GRPOConfig(run_name="there").logging.output_dir == Path("runs/there")
    assert GRPOConfig(logging=LoggingConfig(eval_steps=5), output_dir="here/there").logging.run_name == "there"


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"^run file not found: .*absent\.yaml$"):
        load_config(tmp_path / "absent.yaml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: a\noptim: b: c\n", "mine.yaml, line 2: mapping values are not allowed here"),
        ("optim:\n  max_steps: 1\n  max_steps: 2\n", "mine.yaml, line 3: duplicate key 'max_steps'"),
        ("seed: !!python/name:os.system\n", "mine.yaml, line 1: could not determine a constructor"),
        ("a: \x01", "mine.yaml: unacceptable character"),
        ("- model\n", "mine.yaml: must contain sections such as"),
        ("optim: 5\n", "optim: must be a section with keys (got 5)"),
        (
            "learning_rate: 1\noptim: {learning_rate: 2}",
            "learning_rate: is the same option as optim.learning_rate, which is set too",
        ),
    ],
)
def test_the_error_for_a_broken_file_is_one_line_with_the_place(error_of: ErrorOf, text: str, message: str) -> None:
    error = error_of(text)
    assert message in error
    assert "\n" not in error


def test_file_that_is_not_text(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="is not UTF-8 text"):
        load_config(tmp_path / "mine.yaml")


# Overrides


@pytest.mark.parametrize(
    ("override", "section", "field", "value"),
    [
        ("optim.max_steps=5", "optim", "max_steps", 5),
        ("max_steps=5", "optim", "max_steps", 5),
        ("lora.targets=[q_proj, v_proj]", "lora", "targets", ["q_proj", "v_proj"]),
        ("lora.targets=qkv", "lora", "targets", "qkv"),
        ("data.eval=null", "data", "eval", None),
        ("data.eval=", "data", "eval", None),
        ("data.shuffle=false", "data", "shuffle", False),
        ("data.system_prompt='Answer: x=1'", "data", "system_prompt", "Answer: x=1"),
        ("data.options={size: 9}", "data", "options", {"size": 9}),
        ("data.options.size=9", "data", "options", {"size": 9, "seed": 1}),
        ("data={eval: other}", "data", "eval", "other"),
        ("rewards.functions=[a.py:f, b.c:g]", "rewards", "functions", ["a.py:f", "b.c:g"]),
        ("scale_rewards=none", "algorithm", "scale_rewards", "none"),
    ],
)
def test_override(load: Load, override: str, section: str, field: str, value: object) -> None:
    text = "data: {eval: rows.json, options: {size: 5, seed: 1}}\noptim: {max_steps: 3}"
    changed = load(text, override).model_dump()
    assert changed[section][field] == value
    changed[section][field] = load(text).model_dump()[section][field]
    assert changed == load(text).model_dump()


def test_override_of_a_top_level_key_and_the_last_override_takes_precedence(load: Load) -> None:
    assert load("seed: 1", "seed=2", "seed=3").seed == 3
    assert load("", "max_steps=2", "optim.max_steps=3").optim.max_steps == 3


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("max_steps", "max_steps: is not an override; write section.field=value"),
        ("=5", "=5: is not an override; write section.field=value"),
        ("seed=[1", "seed: '[1' is not valid YAML, line 1"),
        ("optim=5", "optim: must be a section with keys (got 5)"),
        ("seed.x=5", "seed.x: seed has no keys (it is 1)"),
    ],
)
def test_wrong_override(error_of: ErrorOf, override: str, message: str) -> None:
    assert error_of("seed: 1", override).startswith(message)


# Dump

TEXT = st.one_of(
    st.text(min_size=1),
    st.sampled_from(["1e-4", "0o17", "08", "1:30", "null", "2025-01-31", "yes", "- a", "a: b", ".5", "#", "a\r\nb", "\x85"]),
)
CONFIG = st.builds(
    GRPOConfig,
    model=st.builds(ModelConfig, name=TEXT, revision=st.none() | TEXT),
    lora=st.builds(
        LoraConfig,
        rank=st.integers(1, 128),
        alpha=st.floats(1e-6, 1e6),
        use_rslora=st.booleans(),
        targets=st.sampled_from(["qkv", "attention", "all-linear"]) | st.lists(TEXT, min_size=1),
    ),
    optim=st.builds(OptimConfig, learning_rate=st.floats(1e-12, 1, exclude_min=True), adam_epsilon=st.floats(1e-30, 1)),
    data=st.builds(
        DataConfig,
        train=TEXT,
        system_prompt=st.none() | TEXT,
        options=st.dictionaries(TEXT, st.integers() | st.floats(allow_nan=False) | st.booleans() | TEXT),
    ),
    rewards=st.builds(RewardsConfig, functions=st.lists(TEXT)),
    logging=st.builds(LoggingConfig, run_name=TEXT.filter(lambda text: not {"/", ".."} & {*text, text} and text != ".")),
    seed=st.integers(0, 2**32 - 1),
)


@settings(deadline=None)
@given(config=CONFIG)
def test_dump_reads_back(tmp_path_factory: pytest.TempPathFactory, config: GRPOConfig) -> None:
    path = tmp_path_factory.getbasetemp() / "config.yaml"
    path.write_text(dump_config(config), encoding="utf-8")
    assert load_config(path).model_dump() == config.model_dump()


def test_dump_is_complete_and_plain_yaml() -> None:
    dumped = yaml.safe_load(dump_config(GRPOConfig(rank=100)))
    assert list(dumped) == list(GRPOConfig.model_fields)
    assert dumped["lora"] == {
        "start_from": None,
        **{"rank": 100, "alpha": 32.0, "rank_pattern": {}, "alpha_pattern": {}, "max_rank": 128, "use_rslora": False},
        **{"targets": "all-linear", "init_lora_weights": "default", "dropout": 0.0, "use_dora": False},
    }
