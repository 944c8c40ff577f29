"""Reward functions: how they are found, called and combined.

    scorer = Scorer(RewardsConfig(functions=["my_rewards.py:correct", "trl.rewards:think_format_reward"], weights=[1.0, 0.2]))
    scores = scorer.score(Inputs(prompts=..., completions=..., completion_ids=..., columns={"answer": [...]}))

`loading` turns a spec into a function, `contract` says how one is called (as TRL does), `runner` scores with several, inline or
in the processes of `processes` and `worker`, and `combining` puts their results together. The other modules are built-in
rewards: see docs/rewards.md.
"""

from .config import RewardFunction, RewardsConfig
from .contract import Inputs, RewardError
from .loading import RewardSpec, load_object, load_reward, reward_name
from .runner import Scorer, Scores

__all__ = [
    "Inputs",
    "RewardError",
    "RewardFunction",
    "RewardSpec",
    "RewardsConfig",
    "Scorer",
    "Scores",
    "load_object",
    "load_reward",
    "reward_name",
]
