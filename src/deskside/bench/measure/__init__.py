"""Measures: targets, prompts, the loop over runs, and the ceilings of the machine."""
