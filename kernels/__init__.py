"""Numerical building blocks in plain torch and Triton; imports nothing else of this package."""
