"""Triton's kernels for quantised weights."""
