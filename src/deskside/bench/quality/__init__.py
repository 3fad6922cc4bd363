"""Measures what quantizing costs: perplexity, and divergence from a reference run."""
