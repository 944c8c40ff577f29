"""The mailbox between workers and the process that shows them, and its events; in a cluster, `test_cluster_runs.py`."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from rankup.grpo.cluster.events import Event, EventView
from rankup.grpo.cluster.mailbox import Mailbox, Outcome
from rankup.grpo.display.terminal import PlainView
from rankup.grpo.display.view import SampleRow, View


@pytest.fixture
def mailbox() -> Mailbox:
    return Mailbox()


def shown(act_on) -> str:
    """What a plain view prints when `act_on` is called with it."""
    output = io.StringIO()
    with PlainView(max_steps=5, run_name="sums", console=Console(file=output, width=120)) as view:
        act_on(view)
    return output.getvalue()


def every_call(view: View) -> None:
    view.stage("loading")
    view.note("careful")
    view.resumed(1, [{"step": 1, "reward": 0.1}])
    view.step(2, {"reward": 0.25, "completions/mean_length": 8.0}, {"rollout": 1.0, "train": 0.5})
    view.completions(2, [SampleRow("what is 1 + 1?", "2", 1.0, 0.5)])
    view.evaluation(2, {"eval_reward": 0.5}, "during")
    view.finish({"steps": 2, "evaluation": {"before": {"reward": 0.1}, "after": {"reward": 0.5}}, "seconds": {"total": 3.0}})


def test_a_view_that_sends_events_equals_the_real_view():
    events: list[Event] = []
    every_call(EventView(events.append))

    def show_all(view: View) -> None:
        for event in events:
            event.show(view)

    assert shown(show_all) == shown(every_call) != ""


def test_events_are_taken_once_and_in_order(mailbox: Mailbox):
    events = [Event("note", ("a",)), Event("stage", ("b",))]
    for event in events:
        mailbox.post(event)
    assert mailbox.take() == events
    assert mailbox.take() == []


def test_the_end_is_shown_only_when_the_run_is_over(mailbox: Mailbox):
    lost, step, end = Event("finish", ({"steps": 1},)), Event("step", (2, {}, {})), Event("finish", ({"steps": 2},))
    for event in (lost, step, end):
        mailbox.post(event)
        assert mailbox.take() == ([] if event.method == "finish" else [event])
    assert mailbox.take(is_over=True) == [end]


@pytest.mark.parametrize(
    ("event", "has_begun"),
    [
        (Event("note", ("a",)), False),
        (Event("evaluation", (0, 0.5, "before")), False),
        (Event("resumed", (4, [])), True),
        (Event("step", (1, {}, {})), True),
    ],
)
def test_a_run_has_begun_once_it_resumes_or_makes_its_first_step(mailbox: Mailbox, event: Event, has_begun: bool):
    mailbox.post(event)
    assert mailbox.has_begun() == has_begun


def test_a_stop_request_is_received_once_a_worker_polls(mailbox: Mailbox):
    assert not mailbox.request_stop()
    assert mailbox.poll_stop()
    assert mailbox.request_stop()


def test_the_first_outcome_counts_and_later_failures_are_not_shown(mailbox: Mailbox):
    mailbox.report_failure("worker 1: its node has died")
    mailbox.end(Outcome(error="a mistake"))
    mailbox.end(Outcome(error="another worker is gone"))
    mailbox.report_failure("worker 0: collateral")
    assert mailbox.outcome() == Outcome(error="a mistake")
    assert mailbox.take() == [Event("note", ("worker 1: its node has died",))]


def test_a_stop_request_is_not_received_while_workers_restart(mailbox: Mailbox):
    assert not mailbox.poll_stop()
    mailbox.report_failure("worker 1: its node has died")
    assert not mailbox.request_stop()


def test_a_run_has_failed_once_its_main_worker_has_saved(mailbox: Mailbox):
    mailbox.set_main_is_working(True)
    assert not mailbox.has_failed()
    mailbox.end(Outcome(error="a mistake"))
    assert not mailbox.has_failed()
    mailbox.set_main_is_working(False)
    assert mailbox.has_failed()
