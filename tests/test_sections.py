"""How a tape is cut into sections of one device each."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deskside.gguf import GGUF
from deskside.lowering.sections import HOST, HOST_TORCH, Offload, cut_by_device, hops
from deskside.models import build_tape
from tests.models import PRESETS, tiny
from tests.placements import cpu_moe, named

TAPES = {preset: build_tape(GGUF.open(tiny(preset))) for preset in PRESETS}


@settings(deadline=None, max_examples=30)
@given(st.sampled_from(PRESETS), st.data())
def test_sections_hold_every_op_once_in_an_order_that_runs(
    preset: str, data: st.DataObject
) -> None:
    tape = TAPES[preset]
    device = st.sampled_from(["cpu", "emu0", "emu1"])
    placement = {name: data.draw(device) for name in tape.weights()}
    sections = cut_by_device(tape, placement)
    weights = [w.name for s in sections for op in s.ops for w in op.weights]
    assert sorted(weights) == sorted(w.name for op in tape.ops for w in op.weights)
    states = [op.state for s in sections for op in s.ops if op.state is not None]
    assert sorted(states) == list(range(len(tape.states)))
    there: dict[str, set[int]] = {s.device: set() for s in sections}
    exported: dict[int, int] = {}
    for i, s in enumerate(sections):
        for value in s.imports:
            assert exported[value.id] in s.waits and value.id not in there[s.device]
        there[s.device].update(v.id for v in s.imports)
        for op in s.ops:
            assert all(v.id in there[s.device] for v in op.inputs)
            there[s.device].update(v.id for v in op.outputs)
            first = op.weights[0].name if op.weights else ""
            home = HOST if s.device == HOST_TORCH else s.device
            assert not first or home == placement[first]
        exported.update({v.id: i for v in s.exports})


def test_a_gpu_hands_over_to_the_experts_before_it_computes_the_shared_one() -> None:
    tape = TAPES["tiny-moe"]
    sections = cut_by_device(tape, cpu_moe(tape.weights()))
    kinds = [(s.device, [op.kind for op in s.ops][-1]) for s in sections]
    layer = [("emu0", "route"), ("cpu", "experts"), ("emu0", "sigmoid_gate")]
    assert kinds == [("cpu", "embed"), *(4 * layer), ("emu0", "linear")]
    beside = [s for s in sections if s.ops[-1].kind == "sigmoid_gate"]
    assert all(not s.waits for s in beside)


def test_one_device_is_one_section() -> None:
    for tape in TAPES.values():
        sections = cut_by_device(tape, dict.fromkeys(tape.weights(), "emu0"))
        assert len(sections) == 1 and sections[0].exports == (tape.logits,)
        assert hops(sections, lambda v: v.width) == (0, 0)
        (native,) = cut_by_device(tape, dict.fromkeys(tape.weights(), "cpu"))
        assert native.ops == tape.ops and native.exports == ()


@pytest.mark.parametrize("name", ["one expert tensor alone", "convolution apart"])
def test_torch_runs_on_the_host_only_what_no_native_kernel_has(name: str) -> None:
    sections = cut_by_device(TAPES["tiny-moe"], named("tiny-moe")[name])
    kinds = {op.kind for s in sections if s.device == HOST_TORCH for op in s.ops}
    assert kinds and kinds <= {"conv_silu", "expert_linear", "expert_sum"}


@pytest.mark.parametrize("all_", [True, False])
@pytest.mark.parametrize("native", [True, False])
def test_an_op_keeps_its_index_and_new_ones_have_further_ones(native: bool, all_: bool) -> None:
    tape = TAPES["tiny-moe"]
    assert [op.index for op in tape.ops] == list(range(len(tape.ops)))
    placement = cpu_moe(tape.weights())
    split = next(name for name in placement if name.endswith("ffn_up_exps.weight"))
    placement[split] = "emu1"
    sections = cut_by_device(tape, placement, native=native, offload=Offload("emu0", all=all_))
    ops = [op for s in sections for op in s.ops]
    assert len({op.index for op in ops}) == len(ops)
    for op in ops:
        assert op.index >= len(tape.ops) or op is tape.ops[op.index]
