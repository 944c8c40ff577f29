"""The pool of instances, the choice between several environments, and how a run file names them."""

import asyncio
import functools
import random
import sys
import threading
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sample_environments import FIND, LONG, Guess, find, value

from rankup.grpo.common.random_states import random_states
from rankup.grpo.episodes.calls import Caller
from rankup.grpo.episodes.environments import Environments, code_of_episodes, load_environments
from rankup.grpo.episodes.tools import make_tool


@pytest.fixture
def caller() -> Iterator[Caller]:
    caller = Caller(LONG)
    yield caller
    caller.close()


def test_check_14_one_seed_for_all_resets_of_a_prompt_and_another_for_another(caller: Caller) -> None:
    environments = Environments(Guess, caller)
    worlds = [environments.acquire(None) for _ in range(4)]
    for world, seed in zip(worlds, (3, 3, 5, 5), strict=True):
        value(caller, world.reset, world.reset_arguments({"prompt": "p"}, seed), seed=seed)
    numbers = [world.instance.number for world in worlds]  # pyright: ignore[reportAttributeAccessIssue]
    assert numbers[0] == numbers[1] and numbers[2] == numbers[3] and numbers[0] != numbers[2]


def test_check_14_a_reset_that_takes_no_seed_draws_the_same_too(caller: Caller) -> None:
    class Unseeded:
        def reset(self) -> str:
            random.seed(random.random())  # as TextArena does
            return str(random.random())

    environments = Environments(Unseeded, caller)
    before = random_states()
    worlds = [environments.acquire(None, seed=index) for index in range(3)]
    texts = [
        value(caller, world.reset, world.reset_arguments({}, seed), seed=seed)
        for world, seed in zip(worlds, (3, 3, 4), strict=True)
    ]
    assert texts[0] == texts[1] != texts[2]
    assert random_states() == before


def test_a_row_without_a_column_that_reset_requires_is_refused_at_the_start(caller: Caller) -> None:
    class Target:
        def reset(self, target: str) -> None: ...

    environments = Environments(Target, caller)
    environments.check_row({"prompt": "p", "target": "t"})
    with pytest.raises(
        ValueError, match=r"reset of Target requires 'target', which is not a column of the data \(columns: prompt, x\)"
    ):
        environments.check_row({"prompt": "p", "x": 1})


def test_check_20_instances_are_reset_before_each_use_and_never_shared(caller: Caller) -> None:
    environments = Environments(Guess, caller)
    first, second = environments.acquire(None), environments.acquire(None)
    assert first.instance is not second.instance
    value(caller, first.reset, first.reset_arguments({}, 0))
    assert first.respond is not None
    value(caller, first.respond, first.respond_arguments("3"))
    assert first.instance.tried == 1  # pyright: ignore[reportAttributeAccessIssue]
    environments.release(first, reuse=True)
    again = environments.acquire(None)
    assert again.instance is first.instance
    value(caller, again.reset, again.reset_arguments({}, 0))
    assert again.instance.tried == 0  # pyright: ignore[reportAttributeAccessIssue]


def test_an_instance_that_failed_is_closed_and_not_used_again(caller: Caller) -> None:
    environments = Environments(Guess, caller)
    world = environments.acquire(None)
    environments.release(world, reuse=False)
    assert world.instance.closed == 1  # pyright: ignore[reportAttributeAccessIssue]
    others = [environments.acquire(None) for _ in range(3)]
    assert all(other.instance is not world.instance for other in others)
    environments.close()
    assert [other.instance.closed for other in (world, *others)] == [1] * 4  # pyright: ignore[reportAttributeAccessIssue]


def test_the_instance_of_the_start_is_used(caller: Caller) -> None:
    made: list[Guess] = []

    def factory() -> Guess:
        made.append(Guess())
        return made[-1]

    environments = Environments(factory, caller)
    assert environments.acquire(None).instance is made[0] and len(made) == 1


@pytest.mark.parametrize("way", ["inline", "thread", "async"])
def test_all_are_closed_though_some_fail(caplog: pytest.LogCaptureFixture, way: str) -> None:
    caller = Caller(0.2 if way != "inline" else LONG, workers=int(way == "thread"))
    closed: list[int] = []
    release = threading.Event()

    class Fragile:
        def __init__(self) -> None:
            self.number = len(made)
            made.append(self)

        def reset(self) -> None: ...

        def _end(self) -> None:
            closed.append(self.number)
            if self.number == 1:
                sys.exit("no")

    class Awaited(Fragile):
        async def close(self) -> None:
            self._end()
            if self.number == 2:
                await asyncio.Event().wait()

    class Called(Fragile):
        def close(self) -> None:
            self._end()
            if self.number == 2 and way == "thread":
                release.wait()

    made: list[Fragile] = []
    environments = Environments(Awaited if way == "async" else Called, caller)
    worlds = [environments.acquire(None) for _ in range(4)]
    environments.release(worlds[0], reuse=True)
    environments.close()
    assert sorted(closed) == [0, 1, 2, 3]
    assert "close failed: SystemExit: no" in caplog.text
    assert ("timed out" in caplog.text) == (way != "inline")
    release.set()
    caller.close()


def test_a_tool_with_the_name_of_a_method_is_refused_at_the_start(caller: Caller) -> None:
    environments = Environments(Guess, caller)
    with pytest.raises(ValueError, match="two tools are called 'rules'"):
        environments.tools(None, [make_tool(("rules", "Rules.", {}, lambda: ""))])


class NoReset:
    def respond(self, text: str) -> None: ...


class AsyncDone:
    def reset(self) -> None: ...

    async def done(self) -> bool:
        return True


def failing() -> object:
    raise ConnectionError("refused")


def exiting() -> object:
    sys.exit("no")


SHARED = Guess()


@pytest.mark.parametrize(
    ("factory", "reason"),
    [
        (NoReset, "environment NoReset: got an instance of NoReset, which has no method `reset`"),
        (lambda: None, "instance of NoneType"),
        (lambda: Guess, "class Guess"),
        (functools.partial(failing), "environment failing could not be made: ConnectionError: refused"),
        (exiting, "environment exiting could not be made: SystemExit: no"),
        (AsyncDone, "`done` of AsyncDone must not be async"),
        (Guess(), "not an instance"),
        (lambda needed: None, "could not be made: TypeError"),
        ({}, "empty"),
        ({"a": Guess, "b": NoReset}, r"environment 'b' \(NoReset\)"),
        ({"a": lambda: SHARED, "b": lambda: SHARED}, "same object twice"),
    ],
)
def test_what_is_no_environment_is_refused_at_the_start(caller: Caller, factory: Any, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        Environments(factory, caller)


def test_a_factory_that_returns_the_same_object_twice_is_refused(caller: Caller) -> None:
    shared = Guess()
    environments = Environments(lambda: shared, caller)
    environments.acquire(None)
    with pytest.raises(ValueError, match="same object twice"):
        environments.acquire(None)


def test_a_factory_that_fails_later_says_so(caller: Caller) -> None:
    made = iter([Guess()])
    environments = Environments(lambda: next(made), caller)
    environments.acquire(None)
    with pytest.raises(ValueError, match="could not be made: StopIteration") as raised:
        environments.acquire(None)
    assert isinstance(raised.value.__cause__, StopIteration)


def test_a_column_names_one_of_several_environments(caller: Caller) -> None:
    class Other:
        def reset(self, **row: Any) -> None:
            self.row = row

    environments = Environments({"guess": Guess, "other": Other}, caller)
    assert environments.names == ("guess", "other") and environments.reward_names == ("Guess",) and environments.responds
    assert environments.name_of({"environment": "other"}) == "other"
    world = environments.acquire("other")
    value(caller, world.reset, world.reset_arguments({"environment": "other", "x": 1}, 5))
    assert world.instance.row == {"x": 1, "seed": 5}  # pyright: ignore[reportAttributeAccessIssue]
    assert isinstance(environments.acquire("guess").instance, Guess)
    for row in ({}, {"environment": None}, {"environment": "third"}, {"environment": ["guess"]}):
        with pytest.raises(ValueError, match=r"the environments are 'guess', 'other'"):
            environments.check_row(row)
    environments.release(world, reuse=True)
    assert environments.acquire("other").instance is world.instance


CODE = "class Guess:\n    def reset(self): ...\n\ndef make():\n    return Guess()\n\nnumber = 7\n"


def test_environments_of_a_run_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caller: Caller) -> None:
    (tmp_path / "worlds.py").write_text(CODE)
    monkeypatch.chdir(tmp_path)
    assert load_environments(None) is None
    for spec in ("worlds.py:Guess", "worlds.py:make", "worlds:make", {"a": "worlds.py:Guess", "b": "worlds.py:make"}):
        factories = load_environments(spec)
        assert factories is not None
        environments = Environments(factories, caller)
        assert environments.names == (("a", "b") if isinstance(spec, dict) else ())
    for spec, reason in [
        ("worlds.py:Gues", "did you mean Guess"),
        ("worlds.py:number", "not a class"),
        ("Guess", "cannot read"),
    ]:
        with pytest.raises(ValueError, match=f"rollout.environment: .*{reason}"):
            load_environments(spec)
        with pytest.raises(ValueError, match=f"rollout.environment.one: .*{reason}"):
            load_environments({"one": spec})
    with pytest.raises(FileNotFoundError):
        load_environments("missing.py:Guess")


def test_prefixes_name_environments_of_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    package = "rankup.grpo.episodes"
    remote, texts = types.ModuleType(f"{package}.openenv"), types.ModuleType(f"{package}.text_worlds")
    remote.openenv_factory = lambda url: ("openenv", url)  # pyright: ignore[reportAttributeAccessIssue]
    texts.textarena_factory = lambda game: ("textarena", game)  # pyright: ignore[reportAttributeAccessIssue]
    texts.gymnasium_factory = lambda name: ("gymnasium", name)  # pyright: ignore[reportAttributeAccessIssue]
    for module in (remote, texts):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    specs = ["openenv:http://host:8000", "textarena:Wordle-v0", "gymnasium:Taxi-v3", "gymnasium:pkg:Name-v1"]
    expected = [tuple(spec.split(":", 1)) for spec in specs]
    assert [load_environments(spec) for spec in specs] == expected
    assert load_environments({"a": specs[0]}) == {"a": expected[0]}
    with pytest.raises(ValueError, match="behind the colon"):
        load_environments("textarena:")


def test_the_code_of_tools_and_environments_is_compared_when_a_run_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "worlds.py").write_text(CODE)
    (tmp_path / "tools.py").write_text("def add(): ...\n")
    monkeypatch.chdir(tmp_path)
    code = code_of_episodes(
        ["tools.py:add"], {"a": "worlds.py:Guess", "b": "openenv:http://host:8000", "c": "textarena:Wordle-v0"}
    )
    assert set(code) == {"tools.py", "worlds.py"}
    (tmp_path / "worlds.py").write_text(CODE + "# edited\n")
    assert code_of_episodes([], "worlds.py:Guess")["worlds.py"] != code["worlds.py"]
    assert code_of_episodes([], None) == {} and code_of_episodes([], "openenv:http://host:8000") == {}
    factories = load_environments("worlds.py:Guess")
    assert set(code_of_episodes([make_tool(find), FIND, find], factories)) >= {"worlds.py"}


def test_an_instance_that_is_given_back_twice_is_idle_once(caller: Caller) -> None:
    environments = Environments(Guess, caller)
    world = environments.acquire(None)
    environments.release(world, reuse=True)
    environments.release(world, reuse=False)
    assert world.instance.closed == 0  # pyright: ignore[reportAttributeAccessIssue]
    first, second = environments.acquire(None), environments.acquire(None)
    assert first is world and second is not world


@pytest.mark.parametrize("member", ["respond", "get_reward", "close"])
def test_a_member_that_cannot_be_read_is_refused_at_the_start(caller: Caller, member: str) -> None:
    def fails(self: object) -> None:
        raise RuntimeError("not yet")

    factory = type("Late", (Guess,), {member: property(fails)})
    with pytest.raises(ValueError, match="environment Late: its members cannot be read: RuntimeError: not yet"):
        Environments(factory, caller)


def test_closing_ends_though_the_error_of_a_close_has_no_text(caller: Caller, caplog: pytest.LogCaptureFixture) -> None:
    class SilentError(Exception):
        def __str__(self) -> str:
            raise ValueError

    class Silent(Guess):
        def close(self) -> None:
            raise SilentError

    Environments(Silent, caller).close()
    assert "Silent: close failed: ValueError in __str__ of SilentError" in caplog.text
