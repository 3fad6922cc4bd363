"""Experts that the placement has on the CPU, computed on a device: streamed, or resident there."""
