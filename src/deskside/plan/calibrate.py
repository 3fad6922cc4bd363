"""Computes from measured times which share of a machine's limits each sort of step reaches."""

from __future__ import annotations

from collections.abc import Mapping

from deskside.machine.devices import Device, Efficiency


def sort_of(label: str) -> str:
    """The sort of a row of `bench.measure.profile`, by the op that reads most."""
    parts = label.split(" + ")
    if any(p.startswith("experts:") for p in parts):
        return "experts"
    if parts == ["attention"]:
        return "attention"
    if parts == ["delta net"]:
        return "delta"
    if parts == ["head"]:
        return "head"
    return "rows" if parts == ["norms, gates, rounding"] else "dense"


def calibrate(
    decode: Mapping[str, tuple[float, float, float]],
    prefill: Mapping[str, tuple[float, float, float]],
    cpu: Device,
) -> dict[str, Efficiency]:
    """Shares by sort, from the times of a decode step and a piece of prefill.

    decode, prefill: sort -> (seconds, bytes, multiply-adds). cpu: gives the limits.
    Both steps obey t = bytes * x + macs * y: two equations for two unknowns. An unknown below its
    limit is set to the limit; the other then follows from one equation, x from decode or y from
    prefill. Sorts without products keep their assumed shares.
    """
    found: dict[str, Efficiency] = {}
    for sort in decode.keys() & prefill.keys() & {"dense", "experts", "head"}:
        (t1, b1, m1), (t2, b2, m2) = decode[sort], prefill[sort]
        bandwidth, compute = cpu.bandwidth.value * cpu.sustained, cpu.compute.value
        det = b1 * m2 - b2 * m1
        if det <= 0 or min(t1, t2) <= 0:
            continue
        x, y = (t1 * m2 - t2 * m1) / det, (t2 * b1 - t1 * b2) / det
        floor_x, floor_y = 1 / bandwidth, 1 / compute
        if x < floor_x:
            x, y = floor_x, max(floor_y, (t2 - b2 * floor_x) / m2)
        elif y < floor_y:
            x, y = max(floor_x, (t1 - m1 * floor_y) / b1), floor_y
        found[sort] = Efficiency(1 / (bandwidth * x), 1 / (compute * y))
    return found
