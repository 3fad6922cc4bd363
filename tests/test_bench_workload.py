"""Workloads: what ships, what is refused, how they are shrunk and fitted to a context."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deskside.bench.workload import Workload, fit_context, shipped
from deskside.errors import DesksideError
from deskside.machine import gallery

GOOD = """
name = "w"
[sampling]
temperature = 0
[[items]]
name = "a"
prompt = 100
generate = 10
[[items]]
name = "b"
prompt = 50
generate = 5
continues = true
"""


def read(tmp_path: Path, text: str, suffix: str = ".toml") -> Workload:
    path = tmp_path / f"w{suffix}"
    path.write_text(text)
    return Workload.read(str(path))


def test_the_article_is_as_the_article() -> None:
    w = Workload.read("article")
    assert len(w.items) == 28
    published = sorted((i for i in w.items if i.representative), key=lambda i: i.name)
    shapes = [(i.prompt, i.generate) for i in published]
    assert shapes == [(4699, 13), (1125, 2048), (1124, 2048), (15866, 2048), (550, 520)]
    assert shapes == [(r.prompt, r.generated) for r in gallery.entry("article").runs]
    # the others by the rule that the file states
    by_name = {i.name: (i.prompt, i.generate) for i in w.items}
    for k in range(1, 24):
        answer = 9 * (k - 1) % 23 + 1
        assert by_name[f"between {k}"] == (
            round(550 * (15866 / 550) ** (k / 24)),
            round(13 * (2048 / 13) ** (answer / 24)),
        )
    in_order = sorted(w.items, key=lambda i: (i.prompt, i.generate))
    assert list(w.items) == [in_order[13 * (n + 1) % 28] for n in range(28)]
    s = w.sampling
    assert (s.temperature, s.repeat_penalty, s.min_p, s.top_p, s.top_k) == (
        0.7,
        1.2,
        0.01,
        0.95,
        40,
    )
    # length must not grow with time: what drifts would look like an effect of depth
    prompts = [i.prompt for i in w.items]
    half = len(prompts) // 2
    assert 0.5 < sum(prompts[:half]) / sum(prompts[half:]) < 2


def test_what_ships_is_what_it_says() -> None:
    assert shipped() == ["agent", "article", "chat", "code-ingest", "sweep"]
    for name in shipped():
        w = Workload.read(name)
        assert w.name == name and w.description
        assert Workload.from_dict(w.to_dict(), "again") == w
    sweep = Workload.read("sweep")
    ends = [depth for _, depth in sweep.depths()]
    assert ends == [512 * 2**i for i in range(10)] and ends[-1] == 262144
    assert sum(i.continues for i in Workload.read("agent").items) == 9
    assert sum(not i.continues for i in Workload.read("chat").items) == 2
    assert Workload.read("code-ingest").items[0].tree


def test_toml_and_yaml_say_the_same(tmp_path: Path) -> None:
    yaml = """
name: w
sampling: {temperature: 0}
items:
- {name: a, prompt: 100, generate: 10}
- {name: b, prompt: 50, generate: 5, continues: true}
"""
    assert read(tmp_path, GOOD) == read(tmp_path, yaml, ".yaml")


@pytest.mark.parametrize(
    ("old", "new", "part"),
    [
        ('name = "w"', 'name = "w"\nspeed = 3', "unknown field 'speed'"),
        ("prompt = 100", "prompt = 0", "items[0].prompt is 0"),
        ("prompt = 100", "prompt = 1.5", "prompt is 1.5"),
        ("prompt = 100", "prompt = true", "prompt is True"),
        ("prompt = 100", 'prompt = "many"', "expected a whole number"),
        ("prompt = 100", "tokens = 100", "items[0]: unknown field 'tokens'"),
        ("generate = 10", "", "items[0]: field 'generate' is missing"),
        ("generate = 10", "generate = -1", "items[0].generate"),
        ('name = "a"', 'name = ""', "items[0].name is ''; expected text that is not empty"),
        ('name = "a"', 'name = "a"\ncontinues = true', "items[0].continues"),
        ("temperature = 0", "heat = 1", "sampling: unknown field 'heat'"),
        (
            "temperature = 0",
            'temperature = "hot"',
            "sampling.temperature is 'hot'; expected a number",
        ),
        ("temperature = 0", "top_p = 7", "sampling.top_p is 7; expected a number from 0 to 1"),
        ('name = "w"', 'name = "w"\nrepeats = 0', "repeats is 0"),
        ('name = "w"', 'name = "w"\ntoo_long = "cry"', "too_long is 'cry'"),
        ('name = "w"', 'name = "w"\nscale = 2', "scale is 2; expected more than 0 and at most 1"),
        ('name = "w"', "", "field 'name' is missing"),
        ("[[items]]", "[[items]", "not TOML"),
        ("[[items]]", "[[things]]", "unknown field 'things'; the fields are name, items"),
    ],
)
def test_bad_files_are_refused_by_name(tmp_path: Path, old: str, new: str, part: str) -> None:
    with pytest.raises(DesksideError) as failure:
        read(tmp_path, GOOD.replace(old, new))
    assert str(failure.value).startswith(str(tmp_path / "w.toml")) and part in str(failure.value)
    assert "\n" not in str(failure.value)


def test_bad_yaml_and_names_are_refused(tmp_path: Path) -> None:
    for text in ("a: [", "- 1", "", "name: w\nitems: 3", "!!python/object:os.system {}"):
        with pytest.raises(DesksideError, match=r"w\.yaml"):
            read(tmp_path, text, ".yaml")
    with pytest.raises(DesksideError, match="choose one of agent, article"):
        Workload.read("articel")
    with pytest.raises(FileNotFoundError):
        Workload.read(str(tmp_path / "none.toml"))
    (tmp_path / "latin.toml").write_bytes(b'name = "caf\xe9"')
    with pytest.raises(DesksideError, match="UTF-8"):
        Workload.read(str(tmp_path / "latin.toml"))


VALUES = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5))
KEYS = st.sampled_from(["name", "items", "text", "repeats", "sampling", "scale", "prompt", "x"])


@given(st.recursive(VALUES, lambda v: st.lists(v) | st.dictionaries(KEYS, v), max_leaves=12))
def test_anything_is_a_workload_or_a_clear_error(data: Any) -> None:
    fields = data if isinstance(data, dict) else {"name": "w", "items": data}
    try:
        Workload.from_dict(fields, "file")
    except DesksideError as failure:
        assert str(failure).startswith("file:")


def test_a_directory_is_named_from_where_the_file_is(tmp_path: Path) -> None:
    w = read(tmp_path, 'text = "code"\n' + GOOD)
    assert Path(w.text) == tmp_path / "code"


def test_shrinking(tmp_path: Path) -> None:
    w = read(tmp_path, GOOD)
    half = w.shrunk(0.5)
    assert [(i.prompt, i.generate) for i in half.items] == [(50, 5), (25, 2)]
    assert half.items[0].name == "a (50+5)" and half.scale == 0.5
    tiny = w.shrunk(0.001)
    assert [(i.prompt, i.generate) for i in tiny.items] == [(16, 2), (16, 2)]
    cut = w.shrunk(max_prompt=60, max_tokens=7)
    assert [(i.prompt, i.generate) for i in cut.items] == [(60, 7), (50, 5)]
    assert (cut.max_prompt, cut.max_tokens) == (60, 7) and cut.items[1].name == "b"
    assert w.shrunk() == w
    for bad in ({"scale": 0.0}, {"scale": 1.1}, {"max_prompt": 0}, {"max_tokens": -1}):
        with pytest.raises(DesksideError, match="--"):
            w.shrunk(**bad)


def test_what_is_too_long_is_refused_or_listed(tmp_path: Path) -> None:
    w = read(tmp_path, GOOD)
    assert fit_context(w, 165, "") == (w, []) == fit_context(w, None, "")
    with pytest.raises(DesksideError, match=r"item 'b' needs a context of 165 tokens; -c 164"):
        fit_context(w, 164, "-c 164 was given")
    sweep = Workload.read("sweep")
    kept, skipped = fit_context(sweep, 5000, "why")
    assert [i.name for i in kept.items] == ["depth 512", "depth 1024", "depth 2048", "depth 4096"]
    assert len(skipped) == 6 and skipped[0]["reason"] == "needs a context of 8192 tokens; why"
    _, skipped = fit_context(sweep.shrunk(max_prompt=1000), 5000, "why")
    assert skipped[0]["name"] == "depth 2048" and "--max-prompt 1000" in skipped[0]["reason"]
    with pytest.raises(DesksideError, match="no item can run"):
        fit_context(sweep, 100, "why")


def test_a_conversation_ends_where_a_turn_is_left_out(tmp_path: Path) -> None:
    w = read(tmp_path, 'too_long = "skip"\n' + GOOD.replace("prompt = 100", "prompt = 500"))
    more = read(
        tmp_path, 'too_long = "skip"\n' + GOOD + '[[items]]\nname = "c"\nprompt = 9\ngenerate = 1'
    )
    with pytest.raises(DesksideError, match="no item"):
        fit_context(w, 200, "why")
    kept, skipped = fit_context(more, 120, "why")
    assert [i.name for i in kept.items] == ["a", "c"] and [s["name"] for s in skipped] == ["b"]


@pytest.mark.parametrize("name", ["article", "agent", "chat"])
def test_a_workload_is_shrunk_as_far_as_a_context_takes(name: str) -> None:
    whole = Workload.read(name)

    def longest(workload: Workload) -> int:
        return max(depth for _, depth in workload.depths())

    assert whole.within(longest(whole)) == whole
    for n_ctx in (longest(whole) - 1, 1500):
        shrunk = whole.within(n_ctx)
        assert longest(shrunk) <= n_ctx and shrunk.scale < 1
        assert longest(whole.shrunk(shrunk.scale + 0.01)) > n_ctx
    assert whole.within(10) == whole  # nothing that could run: refused later, with its reason
