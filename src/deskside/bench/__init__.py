"""Measures engines: workloads, runs, statistics, verdict, reports.

`measure` writes a `Record`. Every statement about speed is computed from a record.
"""
