"""What quantising costs: perplexity, divergence from a reference run."""
