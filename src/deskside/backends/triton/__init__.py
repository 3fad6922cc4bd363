"""Triton kernels: quantised weights, and the ops of decode that carry state."""
