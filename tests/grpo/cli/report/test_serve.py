"""`rankup report --serve`: what is new reaches an open page, only this machine is answered, and the run is never in the way."""

from __future__ import annotations

import gzip
import http.client
import json
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from report_runs import MadeRun

from rankup.grpo.cli.report.runs import RunFolder
from rankup.grpo.cli.report.serve import LivePage, make_server
from rankup.grpo.run.run_folder import locked_folder

pytestmark = pytest.mark.slow

Make = Callable[..., MadeRun]


@contextmanager
def serving(*runs: MadeRun) -> Iterator[LivePage]:
    """A server of these runs in a thread."""
    with make_server([RunFolder(run.folder) for run in runs], port=0) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def get(server: LivePage, path: str, *, host: str | None = None) -> tuple[int, bytes]:
    """Status and body of the answer to a request."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=60)
    connection.request("GET", path, headers={} if host is None else {"Host": host})
    answer = connection.getresponse()
    return answer.status, answer.read()


def news_of(server: LivePage, seen: str) -> dict[str, Any]:
    return json.loads(get(server, f"/new?seen={seen}")[1])


@pytest.fixture
def run(make_run: Make) -> MadeRun:
    """A run that goes on, after three steps."""
    run = make_run()
    run.play(3)
    return run


def test_an_open_page_shows_new_steps_and_follows_the_run(browser: Any, run: MadeRun) -> None:
    with serving(run) as server:
        browser.open(f"http://127.0.0.1:{server.server_address[1]}/")
        assert browser.texts(".badge") == ["live, step 3"]
        browser.run("window.isTheSamePage = true")
        run.play(2, **{"mine/new": 1.0})
        browser.until("return document.querySelector('.badge').textContent === 'live, step 5'")
        assert browser.texts(".figure .value")[1] == "5"
        browser.click(".others > summary")
        browser.until("return [...document.querySelectorAll('.chart .title')].some((e) => e.textContent === 'mine/new')")
        browser.press("2")
        browser.until("return document.querySelector('.steps .at')?.textContent === 'step 5'")
        browser.until("return document.querySelectorAll('.card').length === 4")
        run.play()
        browser.until("return document.querySelector('.steps .at').textContent === 'step 6'")
        run.finish()
        browser.until("return document.querySelector('.badge').textContent === 'complete'")
        assert browser.run("return window.isTheSamePage"), "it was not loaded again"
        browser.collect()
        assert {url.partition("?")[0].rsplit("/", 1)[0] for url in browser.requests if url.startswith("http")} <= {
            f"http://127.0.0.1:{server.server_address[1]}",
            f"http://127.0.0.1:{server.server_address[1]}/part/0",
        }


def test_the_page_starts_again_when_another_run_takes_the_folder(browser: Any, run: MadeRun, make_run: Make) -> None:
    with serving(run) as server:
        browser.open(f"http://127.0.0.1:{server.server_address[1]}/")
        run.finish()
        new = make_run()  # moves the old one aside
        new.play(1)
        browser.until("return document.querySelector('.badge')?.textContent === 'live, step 1'")


def test_news_are_the_rows_that_a_page_has_not_seen(run: MadeRun) -> None:
    with serving(run) as server:
        assert get(server, "/")[0] == 200
        (first,) = news_of(server, "0.0.0.0")["runs"]
        assert first["metrics"]["reward"][0] == [1, 2, 3] and [step["step"] for step in first["steps"]] == [1, 2, 3]
        assert news_of(server, first["seen"]) == {"runs": [{"seen": first["seen"]}]}
        run.play()
        (second,) = news_of(server, first["seen"])["runs"]
        assert second["metrics"]["reward"][0] == [4]
        assert second["headline"]["steps"] == 4


def test_half_a_line_waits_for_its_end_and_vanished_files_are_missing(run: MadeRun) -> None:
    with serving(run) as server:
        (before,) = news_of(server, "0.0.0.0")["runs"]
        with (run.folder / "metrics.jsonl").open("a") as file:
            file.write('{"step": 9, "rew')
            file.flush()
            assert news_of(server, before["seen"]) == {"runs": [{"seen": before["seen"]}]}
            file.write('ard": 0.5}\n')
        (after,) = news_of(server, before["seen"])["runs"]
        assert after["metrics"] == {"reward": [[9], [0.5]]}
        completions = run.folder / "completions"
        (completions / "step_000002.parquet").unlink()
        (completions / "step_000001.parquet").write_bytes(b"PAR1 half of a file")
        (after,) = news_of(server, before["seen"])["runs"]
        assert [step["step"] for step in after["steps"]] == [3]
        assert [get(server, f"/part/0/{step}")[0] for step in (1, 2, 3, 4)] == [404, 404, 200, 404]


def test_a_resumed_run_starts_the_page_again(run: MadeRun) -> None:
    with serving(run) as server:
        (before,) = news_of(server, "0.0.0.0")["runs"]
        metrics = run.folder / "metrics.jsonl"
        os.truncate(metrics, metrics.read_bytes().index(b"\n") + 1)
        assert news_of(server, before["seen"]) == {"restart": True}
        assert get(server, "/")[0] == 200
        (again,) = news_of(server, "1.0.0.0")["runs"]
        assert "reward" not in again["metrics"]


def test_completions_are_read_when_a_page_asks_for_them(run: MadeRun) -> None:
    with serving(run) as server:
        status, body = get(server, "/part/0/2")
        assert status == 200 and len(json.loads(gzip.decompress(body))["reward"]) == 12


@pytest.mark.parametrize("path", ["/part/0/99", "/part/7/1", "/part/-1/1", "/../../etc/passwd", "/config.yaml"])
def test_there_are_no_other_files(run: MadeRun, path: str) -> None:
    with serving(run) as server:
        assert get(server, path)[0] == 404


@pytest.mark.parametrize("path", ["/part/0/x", "/part/0", "/new?seen=", "/new?seen=a.b.c.d", "/new?seen=0.0.0.0,0.0.0.0"])
def test_questions_that_make_no_sense_are_refused(run: MadeRun, path: str) -> None:
    with serving(run) as server:
        assert get(server, path)[0] == 400
        assert get(server, "/")[0] == 200


def test_only_this_machine_is_answered(run: MadeRun) -> None:
    with serving(run) as server:
        assert server.server_address[0] == "127.0.0.1"
        assert get(server, "/", host="attacker.example")[0] == 403
        assert get(server, "/", host="localhost:9999")[0] == 200, "through a tunnel"


def test_the_run_can_lock_its_folder_and_write_meanwhile(run: MadeRun, tmp_path: Path) -> None:
    with serving(run) as server:
        get(server, "/")
        run.recorder.close()
        with locked_folder(run.folder):
            assert get(server, "/")[0] == 200


def test_a_taken_port_is_an_error_with_the_remedy(run: MadeRun) -> None:
    with serving(run) as server, pytest.raises(ValueError, match="leave out --port for a free one"):
        make_server([RunFolder(run.folder)], port=server.server_address[1])
