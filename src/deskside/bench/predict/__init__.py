"""Predicts the speed of a model from slices of it, before its download."""
