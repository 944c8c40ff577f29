"""What a terminal shows of a run. Imports no torch."""
