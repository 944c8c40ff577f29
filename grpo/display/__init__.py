"""The terminal view of a run. Imports no torch."""
