"""Run files that ship with the package, and the quick start's data."""
