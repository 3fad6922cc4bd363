"""The planner: what it promises for any model, machine and rules, and its byte counts."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from deskside.backends.native.program import CpuBackend
from deskside.convert.synth import outline
from deskside.errors import DesksideError
from deskside.gguf import GGUF
from deskside.gguf.quants import quant_type
from deskside.lowering.memory import Memory
from deskside.lowering.panels import layout, matrices
from deskside.lowering.steps import plan_steps
from deskside.machine.descriptions import load_machine
from deskside.machine.devices import Figure, Machine
from deskside.machine.host import HostOptions
from deskside.models import build_tape
from deskside.plan import DoesNotFit, Options, Plan, make_plan
from deskside.plan.remedies import remedies
from deskside.plan.rules import Override, Rules, apply
from deskside.tape.cache import Cache
from deskside.tape.cost import BatchShape, Work
from tests.models import PRESETS, tiny
from tests.plans import machine, memory_of, options, tape_of

MiB = 1 << 20


PIECES = ["exps", r"blk\.[0-3]\.", "attn_", "shexp", "ssm_out", r"blk\.5\.ffn_down_exps", "output",
          "token_embd", "attn_k", "attn_q_norm", r"blk\.2\.attn_q"]  # fmt: skip
overrides = st.lists(
    st.builds(Override, st.sampled_from(PIECES), st.sampled_from(["cpu", "cuda0", "cuda1"])),
    max_size=3,
)


@st.composite
def cases(draw: st.DrawFn) -> tuple[str, Machine, Rules, Options]:
    preset = draw(st.sampled_from(PRESETS))
    gpus = draw(st.lists(st.floats(1, 60), max_size=3))
    found = machine(draw(st.floats(10, 80)), *gpus, margin=draw(st.sampled_from([0, MiB])))
    rules = Rules(
        tuple(draw(overrides)),
        cpu_moe=draw(st.booleans()),
        gpu_layers=draw(st.sampled_from([None, None, 0, 2, 99])),
    )
    kv = draw(st.sampled_from(["f16", "q8_0"]))
    ctx, n = draw(st.integers(1, 4096)), draw(st.integers(1, 3))
    resident = draw(st.booleans())
    return preset, found, rules, options(ctx, parallel=n, ctk=kv, ctv=kv, mlock=resident)


def planned(case: tuple[str, Machine, Rules, Options]) -> Plan:
    preset, found, rules, o = case
    try:
        return make_plan(tape_of(preset), found, rules, o, memory_of(preset))
    except DesksideError as error:
        assert "\n" not in str(error)
        assume(False)
        raise


@settings(max_examples=150, deadline=None)
@given(cases())
def test_every_plan_keeps_its_promises(case: tuple[str, Machine, Rules, Options]) -> None:
    plan = planned(case)
    preset, found, rules, o = case
    tape = tape_of(preset)
    # every tensor once, with a reason
    assert list(plan.placement) == list(tape.weights()) and set(plan.reasons) == set(plan.placement)
    names = {d.name for d in found.devices}
    assert set(plan.placement.values()) <= names and all(plan.reasons.values())
    # rules hold
    n_layers = 1 + max(op.layer for op in tape.ops)
    pinned = apply(rules, list(tape.weights()), n_layers, [d.name for d in found.gpus])
    for name, device in pinned.devices.items():
        at = plan.placement[name]
        assert at == device or (device == "gpu" and at != "cpu")
    # state lies with its op, and an op where its first weight is or its first input was made
    made: dict[int, str] = {}
    for op in tape.ops:
        own = op.kind != "rope" and op.weights
        where = plan.placement[op.weights[0].name] if own else made[op.inputs[0].id]
        made |= {v.id: where for v in op.outputs}
        if op.state is not None:
            assert plan.state_devices[op.state] == where
    # budgets, counted anew from the placement
    memory = memory_of(preset)
    states = {"cpu": 0} | {d.name: 0 for d in found.devices}
    for s, (state, device) in enumerate(zip(tape.states, plan.state_devices, strict=True)):
        cache_ = Cache([state], n_slots=o.parallel, n_ctx=o.ctx, k_type=quant_type(o.ctk),
                       v_type=quant_type(o.ctv))  # fmt: skip
        states[device] += cache_.nbytes
        assert s < len(tape.states)
    for u in plan.usage:
        name = u.device.name
        placed = [n for n, d in plan.placement.items() if d == name]
        weights = sum(memory.of(n, cpu=name == "cpu", resident=o.resident) for n in placed)
        assert sum(u.weights.values()) == weights
        assert u.kv + u.recurrent == states[name]
        assert u.total == weights + states[name] + u.buffers + u.device.margin
        assert u.free >= 0 and u.total <= u.device.memory
        assert u.buffers > 0 or not placed
    assert plan.rates and all(r.rate > 0 and 0 < r.share <= 1.0 + 1e-9 for r in plan.rates)
    # the same again
    again = planned(case)
    assert (again.placement, again.rates) == (plan.placement, plan.rates)


def objective(plan: Plan) -> float:
    """What the planner makes small: seconds of a token behind half the context."""
    from deskside.plan.search import _Search

    search = _Search(plan.tape, plan.machine, plan.rules, plan.options, memory_of("tiny-moe"))
    split, units = search.best()
    return float(search.speed.seconds(search.shape, search._atoms(split, units[None]))[0])


@settings(max_examples=60, deadline=None)
@given(
    st.floats(12, 80), st.lists(st.floats(1, 30), min_size=1, max_size=2),
    st.lists(st.floats(0, 20), min_size=3, max_size=3), st.integers(1, 4096),
)  # fmt: skip
def test_more_memory_is_never_slower(
    cpu: float, gpus: list[float], more: list[float], ctx: int
) -> None:
    case = ("tiny-moe", machine(cpu, *gpus), Rules(), options(ctx))
    small = planned(case)
    larger = machine(cpu + more[0], *(g + m for g, m in zip(gpus, more[1:], strict=False)))
    large = planned((case[0], larger, case[2], case[3]))
    assert objective(large) <= objective(small) * (1 + 1e-8)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize(("threads", "ubatch"), [(1, 512), (2, 33)])
def test_bytes_are_those_of_the_engine(preset: str, threads: int, ubatch: int) -> None:
    file = GGUF.open(tiny(preset))
    tape = build_tape(file)
    backend = CpuBackend(file, tape, HostOptions(threads), max_tokens=ubatch)
    memory = Memory(tape, threads=threads, ubatch=ubatch)
    assert memory.cpu_buffers == backend.nbytes
    arena = layout(matrices(plan_steps(tape)))[1]
    floats = sum(
        4 * math.prod(w.shape) for op in tape.ops
        if op.kind not in ("linear", "experts", "embed", "bias") for w in op.weights
    )  # fmt: skip
    o = Options(ctx=512, ubatch=ubatch, threads=threads, parallel=2)
    plan = make_plan(tape, machine(1000), Rules(), o, memory)
    (usage,) = plan.usage
    assert sum(usage.weights.values()) == pytest.approx(arena + floats, rel=1e-3)
    cache_ = Cache(tape.states, n_slots=2, n_ctx=512, k_type=quant_type("f16"),
                   v_type=quant_type("f16"))  # fmt: skip
    assert usage.kv + usage.recurrent == cache_.nbytes


def test_bytes_and_products_are_those_of_cost() -> None:
    from deskside.plan.search import _Search

    tape = tape_of("qwen3.5-35b-a3b", 8)
    memory = Memory(tape, threads=2, ubatch=64)
    search = _Search(tape, machine(1e6), Rules(), options(4096), memory)
    work = Work.of(tape)
    for depth in (0, 3000):
        found = search.speed.works(BatchShape(1, depth))
        nbytes = sum(b for w in found for b, _ in w.values())
        assert nbytes == pytest.approx(work.decode(depth, "f16")["bytes"], rel=1e-12)
        macs = sum(m for w in found for s, (_, m) in w.items() if s in
                   ("dense", "experts", "head", "router"))  # fmt: skip
        assert macs == work.decode(depth, "f16")["macs"]


# Limits of decode, IQ4_NL experts, everything else Q8_0, at 100 % of peak.
@pytest.mark.parametrize(
    ("ctx", "kv", "want"),
    [(1, "f16", 82.7), (16384, "f16", 80.8), (135000, "f16", 69.4), (262144, "f16", 60.3),
     (262144, "q8_0", 69.1)],
)  # fmt: skip
def test_the_reference_boxs_roofline(ctx: int, kv: str, want: float) -> None:
    types = [("^output", quant_type("Q8_0"))]
    tape = build_tape(outline("qwen3.5-397b-a17b", types=types).gguf())
    o = Options(ctx=ctx, ctk=kv, ctv=kv, threads=16)
    plan = make_plan(tape, load_machine("epyc-9175f-1x96gb"), Rules(cpu_moe=True), o)
    found = [r for r in plan.rates if not r.prompt][-1]
    assert found.depth == ctx - 1
    assert found.roofline == pytest.approx(want, rel=0.005)


def test_the_speed_model_on_measured_records() -> None:
    """docs/benchmarks: 8 layers of 35b on two cores, 33.7 GB/s and 946 G products a second."""
    tape = tape_of("qwen3.5-35b-a3b", 8)
    base = machine(20000)
    cpu = replace(
        base.cpu, bandwidth=Figure(33.7e9, "measured"), compute=Figure(946e9, "measured"),
        float_compute=Figure(150e9, "measured"), handshake=Figure(2e-6, "measured"),
    )  # fmt: skip
    box = Machine("Xeon", 2, (cpu,))
    for ubatch, prompt, measured in ((512, 512, 564), (2048, 2048, 639), (128, 128, 434)):
        o = Options(ctx=prompt, ubatch=ubatch, threads=2)
        rate = next(r for r in make_plan(tape, box, Rules(), o).rates if r.prompt)
        if rate.prompt == prompt:
            assert rate.rate == pytest.approx(measured, rel=0.2)
    rates = make_plan(tape, box, Rules(), Options(ctx=4097, threads=2)).rates
    decode = {r.depth: r.rate for r in rates if not r.prompt}
    assert decode[0] == pytest.approx(33.4, rel=0.1)
    assert decode[4096] == pytest.approx(29.1, rel=0.2)


def test_a_refusal_says_what_lacks_and_three_ways_that_are_enough() -> None:
    tape = tape_of("tiny-moe")
    small = machine(200, 30)
    o = options(8192, parallel=8)
    rules = Rules(gpu_layers=99)
    with pytest.raises(DoesNotFit, match=r"cuda0 lacks .* where -ngl 99 puts") as caught:
        make_plan(tape, small, rules, o)
    lacking = caught.value.shortfall["cuda0"]
    # exactly that much more is enough, and a byte less is not
    exact = [replace(small.gpus[0], memory=small.gpus[0].memory + lacking - i) for i in (0, 1)]
    enough, short = (replace(small, devices=(small.cpu, d)) for d in exact)
    make_plan(tape, enough, rules, o)
    with pytest.raises(DoesNotFit):
        make_plan(tape, short, rules, o)
    found = remedies(tape, small, rules, o)
    assert len(found) == 3 and [w.price for w in found] == sorted(w.price for w in found)
    for remedy in found:
        assert all(u.free >= 0 for u in remedy.plan.usage)
    with pytest.raises(DoesNotFit, match="cpu lacks") as on_cpu:
        make_plan(tape, machine(40), Rules(), o)
    assert on_cpu.value.shortfall["cpu"] > 0
    flags = [w.flags for w in remedies(tape, machine(60), Rules(), o)]
    assert len(flags) == 3 and "-ctk q8_0 -ctv q8_0" in flags


def test_a_partial_file_and_a_missing_shard(tmp_path: Path) -> None:
    whole = tiny().read_bytes()
    part = tmp_path / "part.gguf"
    part.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DesksideError, match="truncated"):
        GGUF.open(part)
    tape = build_tape(GGUF.open(part, complete=False))
    assert tape.weights().keys() == build_tape(GGUF.open(tiny())).weights().keys()
