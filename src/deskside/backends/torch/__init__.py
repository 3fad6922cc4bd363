"""Torch devices: their ops, weights and captured sections."""
