"""The command `rankup report`: one page for every run."""
