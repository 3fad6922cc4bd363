"""Analyses a record and shows the result."""
