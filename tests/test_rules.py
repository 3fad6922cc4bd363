"""The user's rules: their syntax, their order, and what is refused."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deskside.convert.synth import outline
from deskside.errors import DesksideError
from deskside.models import build_tape
from deskside.plan.emit import numbers
from deskside.plan.rules import (
    Override,
    Rules,
    apply,
    layer_of,
    parse_gpu_layers,
    parse_overrides,
    parse_split,
)

NAMES = list(build_tape(outline("qwen3.5-35b-a3b", layers=8).gguf()).weights())
GPUS = ("cuda0", "cuda1")
# As the reference article splits experts over two GPUs.
ARTICLE = r"blk\.(0|1|2|3)\.ffn_.*_exps=CUDA0,blk\.(4|5)\.ffn_.*_exps=CUDA1,ffn_.*_exps=CPU"


def decide(rules: Rules, gpus: tuple[str, ...] = GPUS) -> dict[str, str]:
    return dict(apply(rules, NAMES, 8, gpus).devices)


def test_the_articles_two_gpu_pattern() -> None:
    found = decide(Rules(parse_overrides([ARTICLE])))
    experts = {n for n in NAMES if "_exps" in n}
    assert set(found) == experts
    for name in experts:
        layer = layer_of(name)
        assert layer is not None
        assert found[name] == ("cuda0" if layer < 4 else "cuda1" if layer < 6 else "cpu")


def test_commas_and_equals_signs_inside_a_regex() -> None:
    text = r"blk\.[0-3]{1,2}\.ffn_(?:up|gate)_exps=CUDA0,attn_(?=q)q=CPU,a{1,2}=x=CUDA_Host"
    assert parse_overrides([text]) == (
        Override(r"blk\.[0-3]{1,2}\.ffn_(?:up|gate)_exps", "cuda0"),
        Override(r"attn_(?=q)q", "cpu"),
        Override(r"a{1,2}=x", "cpu"),
    )


@given(
    st.lists(
        st.tuples(
            st.sampled_from([r"exps", r"blk\.\d{1,2}\.", r"a,b", r"x{1,}", r"(a|b),(c)"]),
            st.sampled_from(["CPU", "CUDA0", "emu1"]),
        ),
        min_size=1,
    )
)
def test_what_is_joined_is_split_again(pairs: list[tuple[str, str]]) -> None:
    text = ",".join(f"{regex}={device}" for regex, device in pairs)
    want = tuple(Override(r, d.lower()) for r, d in pairs)
    assert parse_overrides([text]) == want
    assert parse_overrides([f"{r}={d}" for r, d in pairs]) == want


@pytest.mark.parametrize(
    "text",
    [
        r"blk\.(0|1)\.exps=CUDA0,blk\.2\.exps=CUDA1",
        r"blk\.(0|1)\.exps=CUDA0,       blk\.2\.exps=CUDA1",
        " \t" + r"blk\.(0|1)\.exps =CUDA0 , blk\.2\.exps= CUDA1 ",
        r"blk\.(0|1)\.exps=CUDA0," + "\n    " + r"blk\.2\.exps=CUDA1" + "\n",
        r"blk\.(0|1)\.exps=CUDA0," + "\\\n    " + r"blk\.2\.exps=CUDA1",
        r"blk\.(0|1)\.exps" + "\\\r\n  " + r"=CUDA0,blk\.2\." + "\\\n" + "exps=CUDA1,",
        r"blk\.(0|1)\.exps=CUDA0" + "\n" + r"blk\.2\.exps=CUDA1, ",
    ],
)
def test_white_space_around_a_rule_means_nothing(text: str) -> None:
    want = (Override(r"blk\.(0|1)\.exps", "cuda0"), Override(r"blk\.2\.exps", "cuda1"))
    assert parse_overrides([text]) == want


@pytest.mark.parametrize("text", ["", "  ", "\n", ",", "=CPU", " = CPU", "exps="])
def test_what_is_no_rule_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(DesksideError, match=r"^-ot.*expected REGEX=DEVICE") as caught:
        parse_overrides([text])
    assert "\n" not in str(caught.value)


def test_the_first_match_wins_and_flags_come_after_overrides() -> None:
    rules = Rules(parse_overrides([r"blk\.2\.ffn_.*_exps=CUDA1", "exps=CUDA0"]))
    found = decide(rules)
    assert found["blk.2.ffn_up_exps.weight"] == "cuda1"
    assert found["blk.3.ffn_up_exps.weight"] == "cuda0"
    found = decide(Rules(parse_overrides([r"blk\.2\.ffn_.*_exps=CUDA1"]), cpu_moe=True))
    assert found["blk.2.ffn_up_exps.weight"] == "cuda1"
    assert found["blk.3.ffn_up_exps.weight"] == "cpu"


def test_n_cpu_moe_is_of_the_first_layers() -> None:
    found = decide(Rules(n_cpu_moe=3))
    assert set(found.values()) == {"cpu"}
    assert {layer_of(n) for n in found} == {0, 1, 2}


def test_gpu_layers_count_from_the_last_with_the_head() -> None:
    found = decide(Rules(gpu_layers=3), ("cuda0",))
    assert found["output.weight"] == "cuda0" and found["token_embd.weight"] == "cpu"
    assert {layer_of(n) for n, d in found.items() if d == "cuda0"} == {6, 7, None}
    assert set(found) == set(NAMES)
    assert set(decide(Rules(gpu_layers=0), ("cuda0",)).values()) == {"cpu"}


def test_tensor_split_deals_out_runs_of_layers() -> None:
    found = decide(Rules(gpu_layers=9, tensor_split=(6, 3)))
    assert {layer_of(n) for n, d in found.items() if d == "cuda0"} == set(range(6))
    assert found["output.weight"] == "cuda1"
    assert decide(Rules(gpu_layers=9, tensor_split=(6, 3), main_gpu=0))["output.weight"] == "cuda0"


@pytest.mark.parametrize(
    ("rules", "gpus", "says"),
    [
        (lambda: parse_overrides(["exps"]), GPUS, "expected REGEX=DEVICE"),
        (lambda: parse_overrides([""]), GPUS, "expected REGEX=DEVICE"),
        (lambda: parse_overrides(["(a=CPU"]), GPUS, "not a regex"),
        (lambda: parse_overrides(["nothing_like_it=CPU"]), GPUS, "matches no tensor"),
        (lambda: parse_overrides(["exps=CUDA7"]), GPUS, "there is no device cuda7"),
        (lambda: parse_overrides(["exps=CPU", "up_exps=CUDA0"]), GPUS, "contradicts -ot exps=cpu"),
        (lambda: Rules(parse_overrides(["exps=CUDA0"]), cpu_moe=True), GPUS, "contradicts -ot"),
        (lambda: Rules(cpu_moe=True, n_cpu_moe=2), GPUS, "contradict each other"),
        (lambda: Rules(n_cpu_moe=-1), GPUS, "expected a number of layers"),
        (lambda: Rules(tensor_split=(1,)), GPUS, "1 shares, but there are 2 GPUs"),
        (lambda: Rules(main_gpu=2), GPUS, "counted from 0"),
        (lambda: Rules(gpu_layers=2), (), "no GPU to put layers on"),
        (lambda: Rules(gpu_layers=0, tensor_split=(1, 1)), GPUS, "contradict"),
        (lambda: parse_gpu_layers("many"), GPUS, "expected a number of layers"),
        (lambda: parse_split("1;2"), GPUS, "expected numbers"),
        (lambda: parse_split("0,0"), GPUS, "not all 0"),
    ],
)
def test_what_makes_no_sense_is_said(rules, gpus, says: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(DesksideError, match=re.escape(says)) as caught:
        made = rules()
        decide(made if isinstance(made, Rules) else Rules(made), gpus)
    assert "\n" not in str(caught.value)


def test_experts_flags_need_experts() -> None:
    names = list(build_tape(outline("tiny-llama").gguf()).weights())
    with pytest.raises(DesksideError, match="no routed experts"):
        apply(Rules(cpu_moe=True), names, 4, GPUS)


@given(st.sets(st.integers(0, 130), min_size=1))
def test_a_regex_of_numbers_matches_exactly_them(values: set[int]) -> None:
    regex = re.compile(rf"({numbers(values)})\Z")
    assert {n for n in range(1400) if regex.match(str(n))} == values
    assert "," not in regex.pattern
