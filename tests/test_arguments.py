"""The command line as llama.cpp reads one: whole flags, whole values, or an error that names it."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st

from deskside.cli import arguments, peers
from deskside.cli.app import app
from deskside.convert.synth import synth_file
from deskside.errors import DesksideError
from deskside.gguf import GGUF
from tests.commands import deskside, inside, refused
from tests.models import rewrite, tiny

GROUP: Any = typer.main.get_command(app)
COMMANDS = arguments.commands(GROUP.commands)
LISTS = Path(__file__).with_name("peer_flags.txt")
# Flags of ours whose name means something else in one of llama.cpp's programs.
OTHERS = {("bench", "--warmup"), ("perplexity", "--save-logits"), ("predict", "--keep")}


def peer_flags() -> list[tuple[str, list[str]]]:
    """Every flag of both peers, by each of its names, with values for it."""
    found = []
    for line in LISTS.read_text().splitlines():
        words = line.split()
        if words and words[0].startswith("-"):
            names = [w for w in words if w.startswith("-")]
            found += [(name, words[len(names) :]) for name in names]
    return found


PEER_FLAGS = peer_flags()


@pytest.mark.parametrize("command", COMMANDS)
def test_every_flag_of_the_peers_is_ours_or_noted_or_refused_by_its_name(command: str) -> None:
    assert len(PEER_FLAGS) > 900
    unclear = []
    for name, values in PEER_FLAGS:
        if (command, name) in OTHERS:
            continue
        try:
            read = COMMANDS[command].read([name, *values, "END"])
        except DesksideError as refusal:
            if refusal.args[0].split()[0].rstrip(":") != name or "no such flag" in str(refusal):
                unclear.append(f"{name}: {refusal}")
            continue
        own = name in COMMANDS[command].flags and read.words == [name, *values, "END"]
        if not own and read.unused != [name]:
            own = set(read.words[:-1:2]) <= set(COMMANDS[command].flags)  # by another name
        elif not own and read.words != ["END"]:
            unclear.append(f"{name} leaves {read.words}")
        if not own and read.unused != [name]:
            unclear.append(f"{name}: {read}")
    assert not unclear


@pytest.mark.parametrize("command", COMMANDS)
def test_no_flag_of_ours_is_another_of_the_peers(command: str) -> None:
    for name, values in PEER_FLAGS:
        if (command, name) not in OTHERS and name in COMMANDS[command].flags:
            assert COMMANDS[command].flags[name] == len(values), name


RUN = COMMANDS["run"]
TAKING = sorted(name for name, values in RUN.flags.items() if values == 1)


@given(st.text("abcdefghijklmnopqrstuvwxyz0123456789-_=", min_size=1, max_size=8))
def test_a_word_is_one_flag_or_refused_by_its_whole_name(text: str) -> None:
    word = f"-{text}"
    try:
        read = RUN.read([word, "1", "1"])
    except DesksideError as refusal:
        name = word.partition("=")[0]
        if name.startswith("--"):
            name = name.replace("_", "-")
        assert str(refusal).startswith(name)
        return
    if word == "--":
        assert read.words == ["--", "1", "1"]
    else:
        flags = [w for w in read.words if w.startswith("-")] + read.unused
        assert len(flags) == 1 or "=" in word
        assert word.partition("=")[0].replace("_", "-") in {f.replace("_", "-") for f in flags} or (
            word.partition("=")[0].replace("_", "-") in peers.TRANSLATED
        )


@given(
    st.lists(
        st.tuples(
            st.sampled_from([n for n in TAKING if n not in peers.TRANSLATED]),
            st.one_of(st.text(), st.sampled_from([*TAKING, "-1", "--", "-rtr", "--no-warmup"])),
        ),
        max_size=6,
    )
)
def test_values_are_never_eaten(pairs: list[tuple[str, str]]) -> None:
    words = [word for pair in pairs for word in pair]
    read = RUN.read(words)
    assert read.words == words and not read.unused


@pytest.mark.parametrize("prompt", ["-rtr", "--", "-n", "--no-warmup=1", "-1", "-p", "a\nb"])
def test_nor_are_they_by_typer(prompt: str) -> None:
    with mock.patch("deskside.cli.run._main") as begun:
        done = inside("run", "-p", prompt, "-n", "-1", "-s", "-1", "-r", prompt)
    assert done.returncode == 0, done.stderr
    assert begun.call_args[0][1] == prompt
    params = begun.call_args[0][5]
    assert (params.max_tokens, params.stop) == (-1, (prompt,))
    assert params.seed in (None, -1)  # both mean a random one


def test_what_is_unknown_is_refused_and_what_does_nothing_is_noted() -> None:
    refused("run", "-rtx", part="-rtx: deskside run has no such flag; did you mean")
    refused("run", "-hx", part="-hx: deskside run")
    refused("-hx", part="-hx: no such flag before a command")
    refused("run", "-c4096", part="-c4096: a value stands apart: -c 4096")
    refused("run", "-pps", part="-pps: it is the flag of a measurement")
    refused("run", "--lora", "x", part="--lora: a model is run as its file says")
    refused("run", "-rtr=1", part="-rtr takes no such value")
    refused("run", "--mirostat", "2", part="--mirostat: this way of sampling")
    refused("run", "-m", part="-m: a value is missing")
    refused("bench", "-n", "128", part="-n has no meaning in deskside bench")
    refused("compare", "-c", "1", part="-c has no meaning in deskside compare")
    refused("run", "a.gguf", "-m", "b.gguf", part="two models")
    refused("run", "-sys", "a", "-sysf", "b", part="-sys and -sysf")
    refused("plan", "tiny-moe", "--preset", "tiny-moe", part="two models")
    refused("plan", "no-such", part="no-such: no such file, and no preset")
    refused("perplexity", part="give one text")
    with mock.patch("deskside.cli.run._main"):
        done = inside(
            *("run", "-p", "x", "-rtr", "-fmoe", "-ger", "-fa", "-mla", "3", "-amb", "512"),
            *("--mirostat", "0", "--no_warmup", "--host", "::", "--port", "1", "-np", "4", "-ger"),
        )
    assert done.returncode == 0, done.stderr
    assert done.stderr.decode().splitlines() == [
        "note: these change nothing here: -rtr, -fmoe, -ger, -fa, -mla, -amb, --mirostat, "
        "--no-warmup, --host, --port, -np"
    ]


def options(*words: str) -> dict[str, Any]:
    """The engine's options that a command line of `run` sets."""
    with mock.patch("deskside.cli.run._main") as begun:
        done = inside("run", "-p", "x", *words)
    assert done.returncode == 0, done.stderr
    found = begun.call_args[0][6]
    assert isinstance(found, dict)
    return {**found, "think": begun.call_args[0][4]}


def test_flags_that_have_another_name_here() -> None:
    assert options("--reasoning", "off") == {"think": False}
    assert options("-rea", "on") == {"think": True}
    assert options("--reasoning-budget", "0") == {"think": False}
    assert options("--chat-template-kwargs", '{"enable_thinking": false}') == {"think": False}
    assert options("--load-mode", "mlock") == {"no_mmap": True, "mlock": True, "think": None}
    assert options("--moe-cache-mib", "512") == {"expert_cache": "512MiB", "think": None}
    assert options("--numa", "distribute") == {"think": None}
    assert options("--numa", "interleave") == {"numa": "interleave", "think": None}
    for words in (
        ("--reasoning-budget", "100"),
        ("--chat-template-kwargs", '{"a": 1}'),
        ("--chat-template-kwargs", "{"),
        ("--load-mode", "tape"),
        ("--moe-cache-mib", "some"),
    ):
        refused("run", "-p", "x", *words, part=words[0])


def test_turns_of_a_conversation(tmp_path: Path) -> None:
    model = tiny()
    common = ("-m", model, "-n", "2", "--temp", "0")
    answers = {
        words: deskside("run", *common, *words, stdin=b"").stderr.count(b"ended by")
        for words in (("-p", "a"), ("-p", "a", "-cnv"), ("-p", "a", "-cnv", "-st"))
    }
    assert list(answers.values()) == [1, 1, 1]
    (tmp_path / "s").write_text("be brief\n")
    by_file = deskside("run", *common, "-p", "a", "-sysf", tmp_path / "s")
    by_flag = deskside("run", *common, "-p", "a", "-sys", "be brief")
    assert by_file.returncode == 0 and by_file.stdout == by_flag.stdout
    figures = [done.stderr.decode().partition(" at ")[0] for done in (by_file, by_flag)]
    assert figures[0] == figures[1]


# ---- the article's lines ------------------------------------------------------------------------

COMMON = (
    "-c 262144 {} -ngl 99 -fa on -ctk q8_0 -ctv q8_0 -b 4096 -ub 4096 --threads 16 "
    "--threads-batch 16 -ger --jinja --host 0.0.0.0 --port 8001 --temp 0.7 --repeat-penalty 1.2 "
    "--min-p 0.01 --top-p 0.95 --top-k 40 --seed 3407"
)
RULES = r"""-ot "blk\.(0|1|2)\.ffn_.*_exps=CUDA0, \
         blk\.(3|4|5)\.ffn_.*_exps=CUDA1,exps=CPU" """
LINES = [COMMON.format("--cpu-moe"), COMMON.format(RULES), COMMON.format("")]


def split(line: str) -> list[str]:
    """The words of a line, by the shell that reads it."""
    script = f"printf '%s\\0' {line}"
    done = subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=True)
    return done.stdout.split("\0")[:-1]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight layers, the article's context."""
    folder = tmp_path_factory.mktemp("article")
    synth_file("tiny-moe", folder / "small.gguf", layers=8, vocab=2560)
    arch = GGUF.open(folder / "small.gguf").get("general.architecture")
    keys = {f"{arch}.context_length": 262144}
    return rewrite(folder / "small.gguf", folder / "m.gguf", metadata=keys)


@pytest.mark.parametrize("line", LINES, ids=["cpu-moe", "rules", "one GPU"])
def test_the_articles_lines_start_in_run(
    line: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))  # no measured machine with a GPU
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    done = deskside("run", "-m", model, *split(line), "-p", "hi", "-n", "2")
    assert done.returncode == 0, done.stderr
    notes = [x for x in done.stderr.decode().splitlines() if x.startswith("note: ")]
    notes = [x for x in notes if "this process may use" not in x]
    assert notes[0] == "note: these change nothing here: -fa, -ger, --jinja, --host, --port"
    assert notes[1].startswith("note: there is no GPU to use; these change nothing: -ngl")
    assert ("blk" in notes[1]) == (line is LINES[1])
    assert len(notes) == 2


@pytest.mark.parametrize(
    ("line", "gpus"), list(zip(LINES, (1, 2, 1), strict=True)), ids=["cpu-moe", "rules", "one GPU"]
)
def test_the_articles_lines_are_planned_on_its_machines(line: str, gpus: int) -> None:
    machine = f"epyc-9175f-{gpus}x96gb"
    done = inside("plan", "qwen3.5-397b-a17b", *split(line), "--machine", machine)
    assert done.returncode == 0, done.stderr
    said = done.stderr.decode()
    assert "these change nothing here: -fa, -ger, --jinja, --host, --port, --temp" in said
    out = done.stdout.decode()
    assert "-c 262144" in out and "-ub 4096" in out
    if line is LINES[0]:
        assert "--cpu-moe" in out
    if line is LINES[1]:
        assert "CUDA0" not in out and "=cuda1" in out.replace(" ", "")
    if line is LINES[2]:
        assert "-ngl 99: not all of it fits" in said


def test_a_quoted_rule_may_go_on_behind_a_backslash(model: Path) -> None:
    rule = RULES.strip().removeprefix("-ot ").strip('"')
    assert "\\\n" in rule  # as in single quotes, where the shell leaves it
    machine = ("--machine", "epyc-9175f-2x96gb")
    typed = inside("plan", "-m", model, "-ot", rule, *machine)
    [joined] = split(RULES)[1:]
    assert typed.returncode == 0, typed.stderr
    assert typed.stdout == inside("plan", "-m", model, "-ot", joined, *machine).stdout


def test_batch_size_limits_ubatch(model: Path) -> None:
    for words, ubatch in [
        (("-b", "64"), 64),
        (("-b", "4096"), 512),
        (("-ub", "32", "-b", "64"), 32),
    ]:
        shown = inside("plan", "-m", model, *words).stdout.decode()
        assert f"-ub {ubatch} " in shown
