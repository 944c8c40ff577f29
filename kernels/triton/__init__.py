"""Triton kernels, and the functions that launch them. Only modules that run one import them: they import Triton."""
