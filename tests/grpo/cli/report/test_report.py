"""`rankup report` without a browser: folders, packed completions, sizes, and the command line."""

from __future__ import annotations

import base64
import gzip
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from report_runs import MadeRun

from rankup.grpo.cli.main import main
from rankup.grpo.cli.report.completions import pack_step
from rankup.grpo.cli.report.data import compress, shares_of
from rankup.grpo.cli.report.page import render_page
from rankup.grpo.cli.report.runs import RunFolder, columns_of, names_of
from rankup.grpo.cli.report.tokens import TokenTexts
from rankup.grpo.config import load_config
from rankup.grpo.run.completions import read_completions, write_completions

Make = Callable[..., MadeRun]


def index_of(page: Path) -> dict[str, Any]:
    """The index of a page, as its script reads it."""
    match = re.search(r'id="index" data-live="no">([^<]*)</script>', page.read_text())
    assert match is not None
    return json.loads(gzip.decompress(base64.b64decode(match[1])))


@pytest.fixture
def finished(make_run: Make) -> MadeRun:
    """A run of four steps."""
    run = make_run()
    run.play(4)
    run.finish()
    return run


@pytest.fixture
def texts(finished: MadeRun) -> TokenTexts:
    """Those of its tokenizer."""
    texts = TokenTexts.of(load_config(finished.folder / "config.yaml"), finished.folder)
    assert isinstance(texts, TokenTexts)
    return texts


def test_the_command_writes_the_page_beside_the_run(finished: MadeRun, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(finished.folder)]) == 0
    page = finished.folder / "report.html"
    first, second = capsys.readouterr().out.splitlines()
    assert first == f"{page}: {page.stat().st_size / 1e6:.1f} MB"
    assert second == "run: 4 steps, 48 of 48 saved completions"
    (run,) = index_of(page)["runs"]
    assert run["metrics"]["reward"][0] == [1, 2, 3, 4]
    assert [step["step"] for step in run["steps"]] == [1, 2, 3, 4]
    assert main(["report", str(finished.folder), "--output", str(finished.folder / "again.html")]) == 0
    assert (finished.folder / "again.html").read_bytes() == page.read_bytes(), "the same run is the same file"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no-such-folder"], "no-such-folder is not a run folder"),
        (["{run}", "--serve", "--output", "x.html"], "--serve writes no file"),
        (["{run}", "{run}"], "a run folder is given twice"),
        (["{run}", "--port", "80"], "--port is for --serve"),
        (["{run}", "--max-mb", "0.1"], "raise --max-mb"),
    ],
)
def test_mistakes_are_one_line(
    finished: MadeRun, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", *(argument.format(run=finished.folder) for argument in arguments)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_the_page_allows_only_its_own_scripts_and_no_request() -> None:
    page = render_page("</title><script>", compress({"runs": []}), {"0-1": compress("</script>")})
    assert "<title>&lt;/title&gt;&lt;script&gt;</title>" in page
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', page)
    assert policy is not None
    rules = dict(rule.split(" ", 1) for rule in policy[1].replace("&#39;", "'").split("; "))
    assert rules["default-src"] == "'none'" and "connect-src" not in rules
    assert re.fullmatch(r"('sha256-\S+' ?)+", rules["script-src"]) and "unsafe" not in policy[1]
    assert page.count("<script") == 2 + 2, "two scripts, and two that are data"
    assert re.findall(r"(?:src|href)=[\"'](?!data:)", page.replace("base-uri", "")) == []


def test_packed_completions_hold_what_the_file_has(finished: MadeRun, texts: TokenTexts) -> None:
    path = finished.folder / "completions" / "step_000003.parquet"
    rows, packed = read_completions(path), pack_step(path, texts)
    assert packed["of"] == [3, 12] and [group["rows"] for group in packed["groups"]] == [4, 4, 4]
    assert packed["groups"][0]["data"] == {"answer": rows[0]["data"]["answer"]}
    assert packed["text"] == [None] * 12, "the tokens spell them"
    for place, row in enumerate(rows):
        spelled = "".join(packed["vocabulary"][ord(character) - 35] for character in packed["ids"][place])
        assert spelled == row["completion"]
        levels = [ord(character) - 35 for character in packed["logprobs"][place]]
        for level, logprob in zip(levels, row["logprobs"], strict=True):
            assert -((level / 20) ** 2) == pytest.approx(logprob, abs=0.03 + 0.06 * -logprob)


def test_numbers_that_json_lacks_and_columns_of_all_kinds_are_packed(tmp_path: Path) -> None:
    path = tmp_path / "step_000001.parquet"
    prompt = [{"role": "user", "content": "half of a pair: \ud800"}]
    write_completions(
        path,
        1,
        {"prompt": [prompt], "completion": ["x"], "reward": [float("nan")], "advantage": [None], "finish_reason": ["stop"]},
        rewards={"f": [float("inf")]},
        extras={"loss": [float("nan")], "kept": [True]},
        data={"big": [2**70], "small": [123456789], "where": [float("-inf")], "raw": [b"\xff"], "nested": [{"a": [1]}]},
    )
    packed = pack_step(path, None)
    assert compress(packed), "it is strict JSON"
    assert (packed["reward"], packed["rewards"], packed["advantage"]) == ([None], {"f": [None]}, [None])
    data = packed["groups"][0]["data"]
    assert (data["big"], data["small"], data["where"]) == (str(2**70), 123456789, "-inf")
    assert json.loads(data["nested"]) == {"a": [1]}


def test_a_prompt_has_the_same_key_in_every_step(finished: MadeRun) -> None:
    files = [finished.folder / "completions" / f"step_{step:06d}.parquet" for step in (1, 2, 3, 4)]
    keys = [{group["prompt"][0]["content"]: group["key"] for group in pack_step(file, None)["groups"]} for file in files]
    same = [(a[prompt], b[prompt]) for a in keys for b in keys for prompt in a.keys() & b.keys()]
    assert len(same) > 12 and all(one == other for one, other in same)


def test_half_of_a_step_is_half_of_its_groups(make_run: Make) -> None:
    run = make_run(groups=8)
    run.play(1)
    packed = pack_step(run.folder / "completions" / "step_000001.parquet", None, share=0.5)
    assert packed["of"] == [8, 32] and len(packed["groups"]) == 4 and len(packed["reward"]) == 16


@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)  # other work may slow it down
@given(st.lists(st.integers(1, 10_000), min_size=1, max_size=40), st.floats(0.01, 1.5))
def test_what_is_kept_fits_and_the_first_and_last_steps_are_kept_first(sizes: list[int], part: float) -> None:
    limit = part * sum(sizes)
    shares = shares_of(sizes, limit)
    assert len(shares) == len(sizes) and all(0.0 <= share <= 1.0 for share in shares)
    assert sum(size * share for size, share in zip(sizes, shares, strict=True)) <= limit * 1.001
    if sum(sizes) <= limit:
        assert set(shares) == {1.0}
    elif shares.count(1.0) > 1:
        assert shares[0] == shares[-1] == 1.0


def test_values_of_metrics_are_columns() -> None:
    rows = [{"step": 0, "eval_reward": 0.123456789}, {"step": 1, "reward": None, "note": "text"}, {"step": 2, "reward": 1}]
    assert columns_of(rows) == {"eval_reward": ([0], [0.123457]), "reward": ([1, 2], [None, 1.0])}


def test_runs_of_the_same_name_go_by_their_folders(tmp_path: Path) -> None:
    folders = [tmp_path / "one" / "run", tmp_path / "two" / "run", tmp_path / "mine"]
    assert names_of(folders) == ["one/run", "two/run", "mine"]


def test_a_configuration_of_another_version_is_shown_as_it_is(finished: MadeRun) -> None:
    (finished.folder / "config.yaml").write_text("lora: {rank: 8}\nno_such_section: {x: 1}\n")
    run = RunFolder(finished.folder)
    assert run.config is None and run.options() == [("lora.rank", "8", False), ("no_such_section.x", "1", False)]
    assert "no_such_section" in run.facts()[0][1]


def test_a_damaged_completions_file_is_left_out_with_a_line(finished: MadeRun, capsys: pytest.CaptureFixture[str]) -> None:
    (finished.folder / "completions" / "step_000002.parquet").write_bytes(b"PAR1")
    assert main(["report", str(finished.folder)]) == 0
    assert "step_000002.parquet" in capsys.readouterr().err
    (run,) = index_of(finished.folder / "report.html")["runs"]
    assert [step["step"] for step in run["steps"]] == [1, 3, 4]
