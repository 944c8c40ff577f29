"""Reward functions: how they are loaded, called and combined.

    scorer = Scorer(RewardsConfig(functions=["my.py:length", "last_integer"], weights=[0.5, 1.0]))
    scores = scorer.score(Inputs(prompts=["2 + 2 ="], completions=["It is 4"], completion_ids=[[1]], columns={"answer": [4]}))
    scores.total        # [4.5]

`loading` turns a spec into a function, `contract` defines how one is called (as in TRL), `runner` scores with several, inline
or in the pools of `processes` and `ray_pool`, and `combining` combines their results. The other modules are built-in rewards:
see docs/rewards.md.
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
