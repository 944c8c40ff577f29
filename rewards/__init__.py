"""Reward functions: how they are found, called and combined.

    scorer = Scorer(["my_rewards.py:correct", "trl.rewards:think_format_reward"], weights=[1.0, 0.2])
    scores = scorer.score(prompts=..., completions=..., completion_ids=..., columns={"answer": [...]}, trainer_state={})

`loading` turns a spec into a function, `runner` holds the calling contract (TRL's), `answers` has the built-in rewards.
"""

from .loading import RewardSpec, load_object, load_reward, reward_name
from .runner import Scorer, Scores

__all__ = ["RewardSpec", "Scorer", "Scores", "load_object", "load_reward", "reward_name"]
