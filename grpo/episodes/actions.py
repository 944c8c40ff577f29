"""What completions of a run can do: tools to call, and environments to act in.

    actions = Actions.load(config, tools=[add], environments=Guess)         # None if the run has neither
    actions.schemas(row)                                                     # of the tools in a row's prompt
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..config import GRPOConfig
from .calls import Caller
from .environments import EnvironmentFactories, Environments, code_of_episodes, load_environments
from .tools import Tool, ToolSpec, load_tools, make_tool, make_tools
from .worlds import COLUMN

Schema = Mapping[str, Any]
EpisodeTools = Tool | Callable[..., Any] | Sequence[ToolSpec]
"""Several tools, or a single one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Actions:
    """What completions of a run can do: tools to call, and environments to act in."""

    tools: Sequence[Tool]
    environments: Environments | None
    caller: Caller
    code: Mapping[str, str]
    """Hashes of the users' files that they come from."""

    @classmethod
    def load(
        cls,
        config: GRPOConfig,
        *,
        tools: EpisodeTools | None = None,
        environments: EnvironmentFactories | None = None,
    ) -> Actions | None:
        """Those of a user; None: those of the configuration. None if there are neither.

        Raises:
            ValueError, FileNotFoundError: a tool without type hints or docstring, an environment without `reset`, no such file.
        """
        rollout = config.rollout
        given = _listed(tools)
        found = make_tools(given) if given else load_tools(rollout.tools)
        factories = environments or load_environments(rollout.environment)
        if not found and factories is None:
            return None
        caller = Caller(rollout.tool_timeout, rollout.tool_workers)
        worlds = None if factories is None else Environments(factories, caller)
        code = code_of_episodes(given or rollout.tools, environments or rollout.environment)
        return cls(tools=found, environments=worlds, caller=caller, code=code)

    def schemas(self, row: Mapping[str, Any]) -> list[Schema]:
        """The tools of a row's prompt.

        Raises:
            ValueError: its column `environment` names none.
        """
        worlds = self.environments
        of_world = [] if worlds is None else worlds.tools(worlds.name_of(row))
        return [tool.schema for tool in [*self.tools, *of_world]]

    def all_schemas(self) -> list[Schema]:
        """Those of all tools that are known before an episode begins; of one to try if they are known later only."""
        worlds = self.environments
        names = () if worlds is None else worlds.names or (None,)
        of_worlds = [tool for name in names if worlds is not None for tool in worlds.tools(name)]
        schemas = list({str(tool.schema): tool.schema for tool in [*self.tools, *of_worlds]}.values())
        if not schemas and worlds is not None and worlds.has_own_tools:
            return [make_tool(("probe", "Any tool.", {"type": "object", "properties": {}}, lambda: None)).schema]
        return schemas

    def rows_without_data(self, config: GRPOConfig) -> list[dict[str, Any]] | None:
        """The rows of a run without training data, as many as a step needs; None: there is no environment, which owns the data
        then: its `reset` returns the prompts.

        Raises:
            ValueError: rows must name their environment; the length of the run is given in epochs.
        """
        if self.environments is None:
            return None
        if self.environments.names:
            raise ValueError(
                f"no training data, of which a column {COLUMN!r} names one of the environments: set data.train, pass "
                "train_dataset to GRPOTrainer, or give a single environment, whose `reset` returns the prompts"
            )
        if config.optim.num_train_epochs is not None:
            raise ValueError(
                "optim.max_steps must be set: there is no training data, since `reset` of the environment returns the prompts, "
                f"so optim.num_train_epochs={config.optim.num_train_epochs:g} is no number of steps"
            )
        return [{} for _ in range(config.optim.prompts_per_step)]

    @property
    def runs_beside(self) -> bool:
        """Whether calls run while other episodes are sampled, so that their order does not repeat."""
        worlds = self.environments
        is_async = any(tool.is_async for tool in self.tools) or (worlds is not None and worlds.is_async)
        return is_async or self.caller.workers > 0

    @property
    def rewards(self) -> bool:
        """Whether an environment gives rewards."""
        return self.environments is not None and bool(self.environments.reward_names)

    @property
    def responds(self) -> bool:
        """Whether an environment answers turns without a call."""
        return self.environments is not None and self.environments.responds


def _listed(tools: EpisodeTools | None) -> list[ToolSpec]:
    if tools is None:
        return []
    return [tools] if isinstance(tools, Tool) or callable(tools) else list(tools)
