"""The desk between workers and the process that shows what they do; in a cluster, `test_cluster.py`."""

from __future__ import annotations

import pytest

from rankup.grpo.cluster.mailbox import Desk, Outcome


@pytest.fixture
def desk() -> Desk:
    return Desk()


def test_calls_are_taken_once_and_in_order(desk: Desk):
    desk.write(("note", ("a",)))
    desk.write(("stage", ("b",)))
    assert desk.take() == [("note", ("a",)), ("stage", ("b",))]
    assert desk.take() == []


@pytest.mark.parametrize(("name", "has_begun"), [("note", False), ("evaluation", False), ("resumed", True), ("step", True)])
def test_a_run_has_begun_with_its_first_step_or_where_it_goes_on(desk: Desk, name: str, has_begun: bool):
    desk.write((name, ()))
    assert desk.has_begun() == has_begun


def test_a_wish_to_stop_is_heard_once_somebody_listens(desk: Desk):
    assert not desk.ask_to_stop()
    assert desk.is_asked_to_stop()
    assert desk.ask_to_stop()


def test_the_first_outcome_counts_and_losses_after_it_are_none(desk: Desk):
    desk.lost("worker 1: its node has died")
    desk.end(Outcome(error="a mistake"))
    desk.end(Outcome(error="another worker is gone"))
    desk.lost("worker 0: collateral")
    assert desk.outcome() == Outcome(error="a mistake")
    assert desk.take() == [("note", ("worker 1: its node has died",))]


def test_a_wish_is_not_heard_while_workers_are_lost(desk: Desk):
    assert not desk.is_asked_to_stop()
    desk.lost("worker 1: its node has died")
    assert not desk.ask_to_stop()


def test_a_run_has_failed_once_its_first_worker_has_saved(desk: Desk):
    desk.set_first_at_work(True)
    assert not desk.has_failed()
    desk.end(Outcome(error="a mistake"))
    assert not desk.has_failed()
    desk.set_first_at_work(False)
    assert desk.has_failed()
