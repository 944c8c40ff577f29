"""Decisions about a step, made from numbers alone. Imports no torch."""
