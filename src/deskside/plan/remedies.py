"""Remedies for a model that does not fit. Each is planned, so it is known to be enough.

The price of a remedy is the share that it gives up: of the context's tokens, of the sequences, or
of the experts or layers that rules wanted on a GPU. A q8_0 cache costs 2 %, halving -ub 5 %
(prefill gets slower). The three cheapest are shown.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from deskside.errors import DesksideError
from deskside.lowering.memory import Memory
from deskside.machine.devices import Machine
from deskside.plan.plan import DoesNotFit, Options, Plan
from deskside.plan.rules import ALL_LAYERS, Rules
from deskside.plan.search import make_plan
from deskside.tape import Tape

CONTEXT_STEP = 256
Q8_PRICE, UBATCH_PRICE = 0.02, 0.05
SHOWN = 3


@dataclass(frozen=True)
class Remedy:
    """flags: to give on the command line instead. plan: the plan with them."""

    flags: str
    price: float
    plan: Plan


def remedies(tape: Tape, machine: Machine, rules: Rules, options: Options) -> list[Remedy]:
    """The cheapest changes that make the model fit: three, or fewer if there are no more."""
    memories: dict[int, Memory] = {}

    def plan(new_rules: Rules, new: Options) -> Plan | None:
        memory = memories.get(new.ubatch) or Memory(
            tape, threads=new.most_threads, ubatch=new.ubatch
        )
        memories[new.ubatch] = memory
        try:
            return make_plan(tape, machine, new_rules, new, memory)
        except DesksideError:
            return None  # also if the change leaves a rule nothing to decide

    found = [remedy for remedy in _single(plan, tape, rules, options) if remedy]
    if len(found) < SHOWN:
        found += [remedy for remedy in _combined(plan, rules, options) if remedy]
    found.sort(key=lambda remedy: remedy.price)
    unique = {remedy.flags: remedy for remedy in reversed(found)}
    return sorted(unique.values(), key=lambda remedy: remedy.price)[:SHOWN]


Planner = Callable[[Rules, Options], Plan | None]


def _single(plan: Planner, tape: Tape, rules: Rules, o: Options) -> Iterator[Remedy | None]:
    q8 = replace(o, ctk="q8_0", ctv="q8_0")
    if (o.ctk, o.ctv) != ("q8_0", "q8_0"):
        yield _remedy("-ctk q8_0 -ctv q8_0", Q8_PRICE, plan(rules, q8))
    yield _context(plan, rules, o, "", 0.0)
    n = o.parallel
    if n > 1:
        fits, best = _largest(1, n - 1, lambda k: plan(rules, replace(o, parallel=k)))
        yield _remedy(f"--parallel {fits}", 1 - fits / n, best)
    ubatch, price = o.ubatch // 2, UBATCH_PRICE
    while ubatch >= 32:
        if made := plan(rules, replace(o, ubatch=ubatch)):
            yield _remedy(f"-ub {ubatch}", price, made)
            break
        ubatch, price = ubatch // 2, price + UBATCH_PRICE
    yield from _relaxed(plan, tape, rules, o)


def _relaxed(plan: Planner, tape: Tape, rules: Rules, o: Options) -> Iterator[Remedy | None]:
    """Remedies that put less on the GPUs than the rules ask for."""
    layers = 1 + max(op.layer for op in tape.ops)
    is_moe = any(op.kind == "experts" for op in tape.ops)
    wanted = min(rules.gpu_layers or 0, layers + 1)
    if wanted:
        fits, best = _largest(0, wanted - 1, lambda k: plan(replace(rules, gpu_layers=k), o))
        yield _remedy(f"-ngl {fits}", 1 - fits / wanted, best)
        yield _remedy("without -ngl", 0.5, plan(replace(rules, gpu_layers=None), o))
    if wanted and is_moe and not rules.cpu_moe:
        first = (rules.n_cpu_moe or 0) + 1
        fits, best = _largest(
            -layers, -first, lambda k: plan(replace(rules, n_cpu_moe=-k, cpu_moe=False), o)
        )
        yield _remedy(f"--n-cpu-moe {-fits}", (-fits - first + 1) / layers, best)
    if rules.overrides:
        kept = tuple(r for r in rules.overrides if r.device == "cpu")
        yield _remedy(
            "without the -ot that name a GPU", 0.6, plan(replace(rules, overrides=kept), o)
        )
    if rules.cpu_moe or rules.n_cpu_moe:
        flag = "--cpu-moe" if rules.cpu_moe else "--n-cpu-moe"
        free = replace(rules, cpu_moe=False, n_cpu_moe=None)
        yield _remedy(f"without {flag}", 0.55, plan(free, o))


def _combined(plan: Planner, rules: Rules, o: Options) -> Iterator[Remedy | None]:
    q8 = replace(o, ctk="q8_0", ctv="q8_0")
    small = replace(q8, ubatch=min(o.ubatch, 64), parallel=1)
    lost = 1 - 1 / o.parallel
    yield _context(plan, rules, q8, "-ctk q8_0 -ctv q8_0", Q8_PRICE)
    flags = f"-ctk q8_0 -ctv q8_0 -ub {small.ubatch}{' --parallel 1' if o.parallel > 1 else ''}"
    yield _context(plan, rules, small, flags, Q8_PRICE + 3 * UBATCH_PRICE + lost)
    free = Rules(main_gpu=rules.main_gpu)
    if rules not in (free, Rules(gpu_layers=ALL_LAYERS)):
        yield _context(plan, free, small, f"{flags} and no rules", 1 + lost)


def _context(plan: Planner, rules: Rules, o: Options, flags: str, price: float) -> Remedy | None:
    """The largest context that fits, in steps of CONTEXT_STEP tokens."""
    max_steps = (o.ctx - 1) // CONTEXT_STEP
    if plan_ := plan(rules, o):
        return _remedy(flags, price, plan_)
    fits, best = _largest(1, max_steps, lambda k: plan(rules, replace(o, ctx=k * CONTEXT_STEP)))
    ctx = fits * CONTEXT_STEP
    return _remedy(f"-c {ctx} {flags}".strip(), price + 1 - ctx / o.ctx, best)


def _largest(low: int, high: int, plan: Callable[[int], Plan | None]) -> tuple[int, Plan | None]:
    """The largest value from low to high that fits, and its plan; None if no value fits.

    If a value fits, smaller ones must fit too.
    """
    best: Plan | None = None
    found = low
    while low <= high:
        middle = (low + high) // 2
        if made := plan(middle):
            best, found, low = made, middle, middle + 1
        else:
            high = middle - 1
    return found, best


def _remedy(flags: str, price: float, plan: Plan | None) -> Remedy | None:
    return Remedy(flags, price, plan) if plan else None


__all__ = ["DoesNotFit", "Remedy", "remedies"]
