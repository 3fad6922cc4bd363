"""Speed of a model from slices of it, before its download."""
