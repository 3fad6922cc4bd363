"""Measures what limits a device of torch: its memory, and transfers from the host and back.

The tests run it on torch's CPU device. It has not yet run on a GPU.
"""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from deskside.machine.devices import MEASURED, Device, Figure, assumed_gpu

NBYTES = 256 << 20
HAND_OVER = 16 << 10  # activations of 4,096 floats
REPEATS, HAND_OVERS = 5, 200


@dataclass(frozen=True)
class DeviceLimits:
    """Bytes per second and seconds.

    name       ours, such as cuda0; title: the maker's
    memory     all bytes of the device
    bandwidth  of the device's memory: the faster of reading it and copying it (counted both ways)
    pinned, pageable  transfer from the host's memory; back: to it, pinned if possible
    hand_over  one way: half of 16 KiB there, a kernel, back, and the wait
    """

    name: str
    title: str
    memory: int
    bandwidth: float
    pinned: float
    pageable: float
    back: float
    hand_over: float


def cuda_devices() -> list[tuple[str, torch.device]]:
    """Our name and torch's name of every CUDA device that torch sees."""
    if not torch.cuda.is_available():
        return []
    return [(f"cuda{i}", torch.device("cuda", i)) for i in range(torch.cuda.device_count())]


def measure_device(name: str, device: torch.device, nbytes: int = NBYTES) -> DeviceLimits:
    """Measure a device of torch. RuntimeError if it has less than three times `nbytes`."""
    cuda = device.type == "cuda"
    title, memory = name, 3 * nbytes
    if cuda:
        properties = torch.cuda.get_device_properties(device)
        title, memory = properties.name, properties.total_memory

    def wait() -> None:
        if cuda:
            torch.cuda.synchronize(device)

    n = nbytes // 4
    pageable = torch.ones(n)
    pinned = pageable.pin_memory() if cuda else pageable.clone()
    there, other = torch.empty(n, device=device), torch.empty(n, device=device)
    sent = 4.0 * n
    rates = {
        "pinned": sent / _best(lambda: there.copy_(pinned, non_blocking=True), wait),
        "pageable": sent / _best(lambda: there.copy_(pageable), wait),
        "back": sent / _best(lambda: pinned.copy_(there, non_blocking=True), wait),
    }
    copying = 2 * sent / _best(lambda: other.copy_(there), wait)
    reading = sent / _best(lambda: there.sum(), wait)
    return DeviceLimits(
        name,
        title,
        memory,
        bandwidth=max(copying, reading),
        hand_over=_hand_over(pinned[: HAND_OVER // 4], there[: HAND_OVER // 4], wait),
        **rates,
    )


def _best(work: Callable[[], object], wait: Callable[[], None]) -> float:
    """Seconds of the fastest of some runs, after a warm-up run."""
    found = []
    for _ in range(REPEATS + 1):
        wait()
        began = time.perf_counter()
        work()
        wait()
        found.append(time.perf_counter() - began)
    return max(1e-9, min(found[1:]))


def _hand_over(host: torch.Tensor, there: torch.Tensor, wait: Callable[[], None]) -> float:
    found = []
    for _ in range(HAND_OVERS):
        began = time.perf_counter()
        there.copy_(host, non_blocking=True)
        there.mul_(1.0)
        host.copy_(there, non_blocking=True)
        wait()
        found.append(time.perf_counter() - began)
    return sorted(found)[len(found) // 2] / 2


def as_device(limits: DeviceLimits) -> Device:
    """For the planner. Arithmetic was not measured, so it is assumed."""
    when = f"{MEASURED} {datetime.date.today()}, {limits.title}, with torch {torch.__version__}"
    return replace(
        assumed_gpu(limits.name, limits.memory),
        bandwidth=Figure(limits.bandwidth, when),
        transfer=Figure(limits.pinned, f"{when}, pinned memory"),
        handshake=Figure(limits.hand_over, when),
        sustained=1.0,  # the measurement was of long reads
    )
