"""When to stream experts of the host to a device, for how many tokens at a time, and how fast.

A pass computes n tokens and copies the host's experts to the device once. So the rate grows with
n, until the device's arithmetic takes as long as the transfer. (The 217 GB of Qwen3.5-397B's
experts in IQ4_NL take 3.95 s over PCIe 5 at 55 GB/s: 130 tok/s at 512 tokens, 4144 at 16384.) The
CPU's time grows with every token. At the break-even both take the same time.

    transfer = bytes of the chosen experts / min(transfer rate, sustained read rate of the host / 3)
    device   = the larger of products / arithmetic and bytes / bandwidth, of experts and the rest
    cpu      = bytes / (bandwidth * e_bytes) + products / (arithmetic * e_macs)

A third, because a copied byte is read from the host's memory, written to pinned memory and read
again. Copies overlap everything that the device computes, except for the first slot of a pass.

Near the break-even, the count of an expert's tokens decides which side is faster. Experts with
fewer than `host_below` tokens stay on the host. `host_below` is chosen for the shortest pass. The
choice assumes that tokens select experts at random: counts are then nearly Poisson distributed. A
real router is less even, and gains more than predicted. With `host_below`, the host takes part in
every layer, so no layer's experts are copied ahead.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache, partial

import numpy as np

from deskside.errors import DesksideError
from deskside.lowering.scratch import expert_bytes
from deskside.machine.devices import CPU, Device, Machine
from deskside.plan.speed import EFFICIENCY, LONG_PROMPT, device_seconds
from deskside.tape import Op, Tape
from deskside.tape.cost import MATRICES, BatchShape, Experts, work

SLOTS = 2
SLOT_SECONDS = 1e-3  # minimum of one transfer: launches and hand-overs are about 1 % of it
MAX_TOKENS = 1 << 20
CLOSE = 0.98  # share of the best rate: a smaller chunk that reaches it needs less memory
DRAM_PASSES = 3


@dataclass(frozen=True)
class StreamPlan:
    """What `StreamOptions` needs, and a prediction. Units: bytes, tokens, seconds, tokens/second.

    nbytes      of all experts that may stream
    slot_bytes  of each of `slots` staging slots
    break_even  the smallest batch that streams as fast as the CPU computes; None: stream nothing
    chunk       tokens of a pass
    host_below  in a pass of `chunk`, experts with fewer tokens stay on the CPU; 0 for none
    rate        of the prompt; limit: the resource that limits it
    seconds     of one pass, by resource; they overlap
    rates       of the same prompt, by chunk; cpu_rate: with all on the CPU
    top_k       experts of a token
    """

    device: str
    nbytes: int
    slot_bytes: int
    slots: int
    break_even: int | None
    chunk: int
    host_below: int
    rate: float
    limit: str
    seconds: Mapping[str, float]
    rates: Mapping[int, float]
    cpu_rate: float
    top_k: int


def plan_stream(
    machine: Machine,
    tape: Tape,
    placement: Mapping[str, str],
    *,
    device: str,
    prompt: int = LONG_PROMPT,
    max_chunk: int = LONG_PROMPT,
    free_bytes: int | None = None,
    resident: float = 0.0,
    rest: Callable[[int], float] | None = None,
) -> StreamPlan | None:
    """Plans how the CPU's experts stream to `device`. None if the CPU has no layer's experts.

    placement   tensor -> device name
    prompt      tokens of the prompt to optimise for
    max_chunk   the largest batch whose activations fit
    free_bytes  of the device, for slots; None for no limit
    resident    share of these experts that an expert cache holds, 0 to 1
    rest        seconds of all other ops in a pass of n tokens, e.g. from `SpeedModel`. Without it
                only weights and their products count, at the devices' rates: no attention, delta
                rule or states.

    DesksideError for an unknown device, counts below 1, or less room than two slots of one expert.
    """
    _check(machine, device, prompt, max_chunk, resident)
    ops = [
        op
        for op in tape.ops
        if op.kind == "experts" and all(placement.get(w.name, CPU) == CPU for w in op.weights)
    ]
    if not ops:
        return None
    model = _Model(machine, tape, placement, ops, machine.device(device), resident, rest)
    slot_bytes = model.slot_bytes(free_bytes)
    model.fill = slot_bytes / model.transfer
    break_even = _first(lambda n: model.stream(n) <= model.cpu(n))
    cpu_rate = prompt / model.prompt_seconds(prompt, min(prompt, max_chunk), model.cpu)

    rates: dict[int, float] = {}
    best: dict[int, int] = {}
    for n in _chunks(prompt, max_chunk):
        best[n] = model.best_cut(n)
        rates[n] = prompt / model.prompt_seconds(prompt, n, partial(model.step, h=best[n]))
    top = max(rates.values())
    chunk = min(n for n, rate in rates.items() if rate >= CLOSE * top)
    host_below = best[chunk]
    seconds = model.parts(chunk, host_below)
    return StreamPlan(
        device=device,
        nbytes=sum(w.nbytes for op in ops for w in op.weights),
        slot_bytes=slot_bytes,
        slots=SLOTS,
        break_even=break_even,
        chunk=chunk,
        host_below=host_below,
        rate=rates[chunk],
        limit=max(seconds, key=lambda name: seconds[name]),
        seconds=seconds,
        rates=rates,
        cpu_rate=cpu_rate,
        top_k=min(op.inputs[1].width for op in ops),
    )


def _check(machine: Machine, device: str, prompt: int, max_chunk: int, resident: float) -> None:
    if prompt < 1 or max_chunk < 1 or not 0 <= resident <= 1:
        raise DesksideError(
            "streaming experts: expected a prompt and a chunk of at least 1 token and a resident "
            f"share of 0 to 1, got {prompt}, {max_chunk}, {resident:g}"
        )
    if device not in {d.name for d in machine.gpus}:
        known = ", ".join(d.name for d in machine.gpus) or "none"
        raise DesksideError(
            f"streaming experts: there is no device {device}; the devices are {known}"
        )


@dataclass
class _Model:
    """Seconds of passes. fill: seconds to fill the first slot, which nothing overlaps."""

    machine: Machine
    tape: Tape
    placement: Mapping[str, str]
    ops: list[Op]
    gpu: Device
    resident: float
    given_rest: Callable[[int], float] | None
    fill: float = 0.0
    rests: dict[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        cpu = self.machine.cpu
        self.read_rate = cpu.bandwidth.value * cpu.sustained
        self.transfer = min(self.gpu.transfer.value, self.read_rate / DRAM_PASSES)
        self.efficiency = {**EFFICIENCY, **self.machine.efficiency}
        # Equal layers are computed once.
        token = BatchShape(1)
        alike = Counter((Experts.of(op), work(op, self.tape.states, token).macs) for op in self.ops)
        self.layers = [(experts, macs, count) for (experts, macs), count in alike.items()]

    def slot_bytes(self, free: int | None) -> int:
        """Bytes of whole experts that take SLOT_SECONDS to copy.

        At most a layer's experts, and at most what fits in `free` bytes.
        """
        one = max(expert_bytes(op) for op in self.ops)
        max_experts = min(op.weights[0].shape[2] for op in self.ops)
        n = min(max(1, math.ceil(SLOT_SECONDS * self.transfer / one)), max_experts)
        if free is not None:
            n = min(n, free // (SLOTS * one))
            if n < 1:
                raise DesksideError(
                    f"streaming experts: {self.gpu.name} has {free} bytes left, but {SLOTS} slots "
                    f"take at least {SLOTS * one}; place fewer tensors on it"
                )
        return n * one

    # Seconds of all streamed layers' experts in a pass of n tokens. Experts with fewer than h
    # tokens run on the host.

    def copy(self, n: int, h: int = 0) -> float:
        nbytes = 0.0
        for experts, _, count in self.layers:
            read = experts.nbytes * _many(experts, n, h)[0] if h > 0 else experts.read(n)
            nbytes += count * (1 - self.resident) * read
        return nbytes / self.transfer

    def on_gpu(self, n: int, h: int = 0) -> float:
        total = 0.0
        for experts, macs, count in self.layers:
            share = _many(experts, n, h)[1] if h > 0 else 1.0
            share += self.resident * (1 - share)  # the device computes resident experts in any case
            arithmetic = share * n * macs / self.gpu.compute.value
            reading = experts.read(n) / (self.gpu.bandwidth.value * self.gpu.sustained)
            total += count * max(arithmetic, reading)
        return total

    def on_cpu(self, n: int, h: int | None = None) -> float:
        """Seconds of experts that are not resident and have fewer than h tokens (None: any)."""
        e = self.efficiency["experts"]
        total = 0.0
        for experts, macs, count in self.layers:
            nbytes, share = experts.read(n), 1.0
            if h is not None:
                many, tokens = _many(experts, n, h)
                nbytes = max(0.0, nbytes - many * experts.nbytes) * (1 - self.resident)
                share = (1 - tokens) * (1 - self.resident)
            total += count * nbytes / (self.read_rate * e.bytes)
            total += count * share * n * macs / (self.machine.cpu.compute.value * e.macs)
        return total

    def rest(self, n: int) -> float:
        if n not in self.rests:
            self.rests[n] = self.given_rest(n) if self.given_rest else self._rest(n)
        return self.rests[n]

    def _rest(self, n: int) -> float:
        total = 0.0
        mine = {op.index for op in self.ops}
        for op in self.tape.ops:
            if not op.weights or op.kind == "embed" or op.index in mine:
                continue
            d = self.machine.device(self.placement.get(op.weights[0].name, CPU))
            one = work(op, self.tape.states, BatchShape(n))
            macs = one.macs if one.sort in MATRICES else 0.0
            total += sum(device_seconds({one.sort: (one.weights, macs)}, d, self.efficiency))
        return total

    def hops(self, n: int) -> float:
        """Seconds to the host and back in every layer, with the activations."""
        each = sum(
            self.gpu.handshake.value + 4 * n * op.inputs[0].width / self.transfer for op in self.ops
        )
        return 2 * each

    # Seconds of whole passes.

    def stream(self, n: int, h: int = 0) -> float:
        if h <= 1:
            return self.fill + max(self.copy(n), self.rest(n) + self.on_gpu(n))
        parts = max(self.copy(n, h), self.on_gpu(n, h), self.on_cpu(n, h))
        return self.rest(n) + len(self.ops) * self.fill + self.hops(n) + parts

    def cpu(self, n: int) -> float:
        return self.rest(n) + self.hops(n) + self.on_cpu(n)

    def step(self, n: int, h: int) -> float:
        """Seconds as the backend runs it: streaming from the break-even on, else on the CPU."""
        return min(self.stream(n, h), self.cpu(n))

    def best_cut(self, n: int) -> int:
        """The `host_below` of the shortest pass; 0 if none is shorter than without."""
        mean = max(n * op.inputs[1].width / op.weights[0].shape[2] for op in self.ops)
        wide = math.ceil(4 * math.sqrt(mean)) + 2
        low, high = max(2, int(mean) - wide), int(mean) + wide
        cuts = sorted({0, *range(low, high + 1, max(1, (high - low) // 32))})
        seconds = [(self.stream(n, h), h) for h in cuts]
        return int(min(seconds)[1])

    def prompt_seconds(self, prompt: int, chunk: int, seconds: Callable[[int], float]) -> float:
        whole, left = divmod(prompt, chunk)
        return (whole * seconds(chunk) if whole else 0.0) + (seconds(left) if left else 0.0)

    def parts(self, n: int, h: int) -> dict[str, float]:
        """Seconds of one pass by resource. They overlap."""
        name = self.gpu.name
        if self.cpu(n) <= self.stream(n, h):
            return {"cpu": self.on_cpu(n), f"{name} arithmetic": self.rest(n)}
        found = {
            f"transfer to {name}": self.copy(n, h if h > 1 else 0),
            f"{name} arithmetic": self.rest(n) + self.on_gpu(n, h if h > 1 else 0),
        }
        if h > 1:
            found["cpu"] = self.on_cpu(n, h)
        return found


def _many(experts: Experts, n: int, h: int) -> tuple[float, float]:
    """The share of experts with at least h tokens, and the share of pairs that are theirs."""
    return _above(n * experts.used / experts.total, h)


@lru_cache(4096)
def _above(mean: float, h: int) -> tuple[float, float]:
    """For counts of h and more: their share of a Poisson distribution, and of its mean."""
    k = np.arange(h)
    log_factorial = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, max(h, 2))))])[:h]
    few = np.exp(k * math.log(mean) - mean - log_factorial)
    return max(0.0, 1 - float(few.sum())), max(0.0, 1 - float((k * few).sum()) / mean)


def _first(holds: Callable[[int], bool]) -> int | None:
    """The smallest count of tokens for which `holds`. It must then hold for all larger ones."""
    high = 1
    while not holds(high):
        high *= 2
        if high > MAX_TOKENS:
            return None
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high


def _chunks(prompt: int, max_chunk: int) -> list[int]:
    """Chunk sizes that cut the prompt in even parts, and powers of two."""
    max_chunk = min(prompt, max_chunk)
    min_parts = -(-prompt // max_chunk)
    even = {-(-prompt // parts) for parts in range(min_parts, min_parts + 6)}
    powers = {1 << i for i in range(6, 21) if 1 << i <= max_chunk}
    return sorted({n for n in even | powers if 1 <= n <= max_chunk} | {max_chunk})
