"""Measures the kernels: time, instructions, registers."""
