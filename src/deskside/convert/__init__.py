"""Everything that makes a model file: from Hugging Face, other quant types, random weights."""
