"""What a run writes while it trains: metrics, completions, trackers, plots."""
