"""When experts should stream, against docs/MODEL.md and against a search by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from deskside.convert.synth import outline
from deskside.errors import DesksideError
from deskside.gguf import GGUF
from deskside.gguf.quants import quant_type
from deskside.lowering.scratch import expert_bytes
from deskside.machine.descriptions import load_machine
from deskside.machine.devices import Efficiency, Figure, Machine
from deskside.models import build_tape
from deskside.plan.stream import StreamPlan, plan_stream
from deskside.tape import Tape
from tests.models import tiny
from tests.placements import cpu_moe

BOX = load_machine("epyc-9175f-1x96gb")


@pytest.fixture(scope="module")
def tape() -> Tape:
    types = [("^output", quant_type("Q8_0"))]
    return build_tape(outline("qwen3.5-397b-a17b", types=types).gguf())


def planned(tape: Tape, machine: Machine = BOX, **options: object) -> StreamPlan:
    found = plan_stream(machine, tape, cpu_moe(tape.weights(), "cuda0"), device="cuda0", **options)  # type: ignore[arg-type]
    assert found is not None
    return found


@pytest.mark.parametrize(("chunk", "rate"), [(16384, 4144), (8192, 2072), (4096, 1036)])
def test_the_rates_of_model_md_where_the_transfer_limits(
    tape: Tape, chunk: int, rate: float
) -> None:
    slow = Efficiency(1.0, 1e-4)  # no help of the CPU
    plan = planned(tape, replace(BOX, efficiency={"experts": slow}), max_chunk=chunk)
    assert (plan.chunk, plan.host_below) == (chunk, 0)
    assert plan.limit == "transfer to cuda0"
    # docs/MODEL.md does not count the first slot's fill.
    assert plan.rate == pytest.approx(rate, rel=0.002)
    assert plan.nbytes == pytest.approx(217.4e9, rel=1e-3)


@pytest.mark.parametrize(("chunk", "rate"), [(2048, 1145), (4096, 1663), (8192, 2699)])
def test_a_cut_per_expert_reaches_most_of_a_split_by_tokens(
    tape: Tape, chunk: int, rate: float
) -> None:
    """docs/MODEL.md splits single tokens, takes 55 % of the CPU, and counts no other work."""
    at_55 = replace(BOX, efficiency={"experts": Efficiency(1.0, 0.55)})
    plan = planned(tape, at_55, prompt=chunk, max_chunk=chunk, rest=lambda n: 0.0)
    assert plan.host_below > 1 and "cpu" in plan.seconds
    assert 0.85 * rate < plan.rates[chunk] < rate


def test_with_resident_experts_the_devices_arithmetic_limits(tape: Tape) -> None:
    plan = planned(tape, resident=0.37)
    assert plan.limit == "cuda0 arithmetic"
    assert 5500 < plan.rate < 6600  # docs/MODEL.md: 5.5 to 6.1 k, attention's scores among it
    assert plan.rate > planned(tape).rate


def test_the_break_even_follows_the_rates(tape: Tape) -> None:
    plan = planned(tape, prompt=512)
    # ik_llama.cpp offloads from 1638 tokens on; docs/MODEL.md's CPU at 55 % would need 2570.
    assert plan.break_even is not None and 1000 < plan.break_even < 2500
    gpu = BOX.gpus[0]
    quick = replace(gpu, transfer=Figure(110e9, "assumed"))
    found = planned(tape, replace(BOX, devices=(BOX.cpu, quick)), prompt=512)
    assert found.break_even is not None and found.break_even < 0.6 * plan.break_even
    weak = replace(gpu, compute=Figure(1e12, "assumed"))
    never = planned(tape, replace(BOX, devices=(BOX.cpu, weak)), prompt=512)
    assert never.break_even is None and never.limit in ("cpu", "cuda0 arithmetic")


def test_larger_chunks_are_never_slower_to_plan_with(tape: Tape) -> None:
    rates = [planned(tape, max_chunk=n).rate for n in (256, 2048, 16384)]
    assert rates == sorted(rates)


def test_slots_are_whole_experts_and_fit(tape: Tape) -> None:
    one = max(expert_bytes(op) for op in tape.ops if op.kind == "experts")
    plan = planned(tape)
    assert plan.slot_bytes % one == 0 and plan.slot_bytes / 55e9 >= 1e-3
    assert planned(tape, free_bytes=5 * one).slot_bytes == 2 * one
    with pytest.raises(DesksideError, match="2 slots take") as error:
        planned(tape, free_bytes=2 * one - 1)
    assert "\n" not in str(error.value)


def test_nothing_streams_without_experts_on_the_cpu() -> None:
    small = build_tape(GGUF.open(tiny("tiny-moe")))
    on_device = dict.fromkeys(small.weights(), "cuda0")
    assert plan_stream(BOX, small, on_device, device="cuda0") is None
    dense = build_tape(GGUF.open(tiny("tiny-llama")))
    assert plan_stream(BOX, dense, cpu_moe(dense.weights(), "cuda0"), device="cuda0") is None


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"device": "cuda7"}, "no device cuda7; the devices are cuda0"),
        ({"prompt": 0}, "at least 1 token"),
        ({"max_chunk": 0}, "at least 1 token"),
        ({"resident": 1.5}, "share of 0 to 1"),
    ],
)
def test_bad_input_is_one_line(options: dict[str, object], part: str) -> None:
    small = build_tape(GGUF.open(tiny("tiny-moe")))
    with pytest.raises(DesksideError, match=part) as error:
        plan_stream(BOX, small, {}, **({"device": "cuda0"} | options))  # type: ignore[arg-type]
    assert "\n" not in str(error.value)
