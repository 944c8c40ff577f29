"""Output of a run: metrics, completions, trackers, plots."""
