"""Episodes: completions of several turns, with tools and environments."""
