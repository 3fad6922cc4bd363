"""Devices that torch drives: ops, weights, captured sections."""
