"""Characterising an engine: workloads, measuring, statistics, verdict, reports.

`measure` and what it uses write a `Record`; all that is said about speed is computed from one.
"""
