"""The command line as a person uses it: real processes, pipes and a terminal."""

from __future__ import annotations

import os
import pty
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from importlib import resources
from importlib.metadata import version
from pathlib import Path
from unittest import mock

import pytest

from deskside.bench.request import Request
from deskside.cli.bench import RUNS, TARGETS, WORKLOAD
from deskside.cli.escapes import unescaped
from deskside.cli.flags import OPTIONS
from deskside.cli.model import MODEL, ModelFlags
from deskside.engine.config import EngineConfig
from deskside.engine.sampler import SamplingParams
from tests.commands import COMMAND, deskside, inside, refused
from tests.models import rewrite, tiny


@pytest.fixture(scope="module")
def model() -> Path:
    return tiny()


def test_a_prompt_is_answered_with_figures(model: Path) -> None:
    done = deskside("run", "-m", model, "-p", "hello", "-n", "5", "--temp", "0")
    assert done.returncode == 0 and done.stdout.strip()
    figures = done.stderr.decode()
    for part in ("prefill", "tok/s", "first token after", "decode 5 tokens", "ended by length"):
        assert part in figures


def test_greedy_answers_repeat(model: Path) -> None:
    first, second = (
        deskside("run", "-m", model, "-p", "x", "-n", "8", "--temp", "0").stdout for _ in "12"
    )
    assert first == second


def test_a_llama_cpp_command_line_works_unchanged(model: Path) -> None:
    done = deskside(
        *("run", "-m", model, "-p", "hi", "-n", "2", "-c", "512", "-t", "2", "-tb", "2"),
        *("-b", "2048", "-ub", "64", "-ngl", "99", "-fa", "on", "-ctk", "q8_0", "-ctv", "q8_0"),
        *("-ot", "exps=CPU", "--cpu-moe", "--no-mmap", "--jinja"),
        *("--temp", "0.7", "--repeat-penalty", "1.2", "--min-p", "0.01", "--top-p", "0.95"),
        *("--top-k", "40", "--seed", "7", "--device", "none", "--main-gpu=0"),
    )
    assert done.returncode == 0, done.stderr
    notes = [line for line in done.stderr.decode().splitlines() if line.startswith("note:")]
    assert [line for line in notes if "this process may use" not in line] == [
        "note: these change nothing here: -fa, --jinja",
        "note: there is no GPU to use; these change nothing: -ngl, --main-gpu",
    ]


def test_piped_text_is_the_prompt_and_need_not_be_utf8(model: Path) -> None:
    done = deskside("run", "-m", model, "-n", "2", stdin=b"caf\xe9 \xff")
    assert done.returncode == 0 and "not all UTF-8" in done.stderr.decode()


def prefilled(*arguments: str | Path, stdin: bytes = b"") -> int:
    """Tokens of the prompt of `deskside run -no-cnv`."""
    done = deskside("run", "-no-cnv", "-n", "1", "--temp", "0", *arguments, stdin=stdin)
    assert done.returncode == 0, done.stderr
    found = re.search(r"prefill (\d+) tokens", done.stderr.decode())
    assert found
    return int(found[1])


def test_escapes_of_prompts_and_stop_strings(model: Path, tmp_path: Path) -> None:
    m, file = ("-m", model), tmp_path / "f"
    file.write_text("a\\n\\nb")
    real, literal = prefilled(*m, "-p", "a\n\nb"), prefilled(*m, "-p", "a\\n\\nb", "--no-escape")
    assert real != literal
    assert prefilled(*m, "-p", "a\\n\\nb") == prefilled(*m, "-p", "a\\n\\nb", "-e") == real
    assert prefilled(*m, "-f", file) == real
    assert prefilled(*m, "-f", file, "--no-escape") == literal
    assert prefilled(*m, stdin=b"a\\n\\nb") == literal  # piped text is nobody's command line
    with mock.patch("deskside.cli.run._main") as begun:
        inside("run", "-p", "x", "-r", "\\n\\n", "-r", "\\x41", "--temp", "0")
        assert begun.call_args[0][5].stop == ("\n\n", "A")
        inside("run", "-p", "x", "-r", "\\n", "--no-escape")
        assert begun.call_args[0][5].stop == ("\\n",)


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        (b"\\n\\r\\t\\'\\\"\\\\", b"\n\r\t'\"\\"),
        (b"\\\\n", b"\\n"),
        (b"\\xC3\\xa9\\x0", b"\xc3\xa9\\x0"),
        (b"\\d+ \\ \\u00e9 \\xg1", b"\\d+ \\ \\u00e9 \\xg1"),
        (b"ends in \\", b"ends in \\"),
    ],
)
def test_escapes_are_llama_cpps(typed: bytes, meant: bytes) -> None:
    assert unescaped(typed) == meant


def test_a_prompt_of_odd_bytes(model: Path, tmp_path: Path) -> None:
    plain = prefilled("-m", model, "-p", "what")
    (tmp_path / "bom").write_bytes(b"\xef\xbb\xbfwhat")
    assert prefilled("-m", model, "-f", tmp_path / "bom") == plain
    assert prefilled("-m", model, stdin=b"\xef\xbb\xbfwhat") == plain
    odd = os.fsdecode(b"caf\xe9")
    for flag in ("-p", "-sys"):
        done = deskside("run", "-m", model, "-n", "1", "-p", "x", flag, odd)
        assert done.returncode == 0, done.stderr
        assert f"{flag} is not all UTF-8" in done.stderr.decode()


def test_context_zero_and_too_many_threads_are_defined(model: Path) -> None:
    done = deskside("run", "-m", model, "-p", "a", "-n", "1", "-c", "0", "-t", "999")
    assert done.returncode == 0 and "note: -t 999: this process may use" in done.stderr.decode()


def test_bad_input_is_one_line_and_exit_code_2(model: Path, tmp_path: Path) -> None:
    (tmp_path / "text.gguf").write_text("not a model")
    refused("run", "-m", tmp_path / "none.gguf", "-p", "x", part="none.gguf")
    refused("run", "-m", tmp_path / "text.gguf", "-p", "x", part="text.gguf")
    refused("run", "-m", tmp_path, "-p", "x", part=str(tmp_path))
    refused("run", "-m", model, "-p", "", part="empty")
    refused("run", "-m", model, stdin=b"", part="empty")
    refused("run", "-m", model, "-p", "x", "-f", "y", part="-p and -f")
    refused("run", "-m", model, "-f", tmp_path / "none.txt", part="none.txt")
    refused("run", "-m", model, "-p", "word " * 900, "-c", "64", part="context 64")
    refused("run", "-m", model, "-p", "x", "-c", "100000", part="-c 100000")
    refused("run", "-m", model, "-p", "x", "-ctk", "q2", part="-ctk q2")
    refused("run", "-m", model, "-p", "x", "--isa", "avx9000", part="avx9000")
    refused("run", "-m", model, "-p", "x", "--temp", "nan", part="temperature")
    refused("run", "-m", model, "-p", "x", "-l", "five", part="--logit-bias five")
    refused("run", "-m", model, "-p", "x", "--no-such-flag", part="--no-such-flag")
    refused("frobnicate", part="frobnicate")
    refused("synth", "no-such-preset", tmp_path / "o.gguf", part="no-such-preset")
    refused("synth", "tiny-moe", tmp_path / "o.gguf", "--experts", "1", part="experts")
    refused("quantize", model, tmp_path / "o.gguf", "--type", "Q9", part="Q9")
    refused("quantize", model, model, "--type", "Q8_0", part=str(model))
    refused("convert", tmp_path, tmp_path / "o.gguf", part="config.json")
    assert not (tmp_path / "o.gguf").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["text.gguf"]


def test_a_hostile_file_cannot_forge_the_error_line(model: Path, tmp_path: Path) -> None:
    evil = {"general.architecture": "x\x1b[2J\nall is well"}
    path = rewrite(model, tmp_path / "m.gguf", metadata=evil)
    done = deskside("run", "-m", path, "-p", "x")
    assert done.returncode == 2 and b"\x1b[2J" not in done.stderr
    assert len(done.stderr.decode().strip().splitlines()) == 1


def test_templates_that_loop_or_escape_are_stopped(model: Path, tmp_path: Path) -> None:
    for i, template in enumerate(
        (
            "{% for a in range(99999) %}{% for b in range(99999) %}x{% endfor %}{% endfor %}",
            "{{ ''.__class__.__mro__[1].__subclasses__() }}",
            "{{ 'a' * 10 ** 12 }}",
            "{% if %}",
        )
    ):
        keys = {"tokenizer.chat_template": template}
        path = rewrite(model, tmp_path / f"{i}.gguf", metadata=keys)
        refused("run", "-m", path, "-p", "x", part=f"{i}.gguf")


def test_synth_quantize_and_run(tmp_path: Path) -> None:
    made, smaller = tmp_path / "a.gguf", tmp_path / "b.gguf"
    done = deskside("synth", "tiny-moe", made, "--layers", "4", "--experts", "8", "--type", "F16")
    assert done.returncode == 0, done.stderr
    rules = ("--type", "Q8_0", "--tensor-type", "_exps=IQ4_NL")
    assert deskside("quantize", made, smaller, *rules).returncode == 0
    assert smaller.stat().st_size < made.stat().st_size / 2
    assert deskside("run", "-m", smaller, "-p", "x", "-n", "3").returncode == 0


def test_a_locale_without_unicode_is_no_traceback(model: Path) -> None:
    command = [*COMMAND, "run", "-m", str(model), "-p", "x", "-n", "40", "--ignore-eos"]
    env = {**os.environ, "PYTHONIOENCODING": "ascii", "LC_ALL": "C"}
    done = subprocess.run(command, capture_output=True, env=env, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr


def test_closed_streams_are_no_traceback(model: Path) -> None:
    line = " ".join(f"'{part}'" for part in [*COMMAND, "run", "-m", str(model)])
    done = subprocess.run(["sh", "-c", line + " <&-"], capture_output=True)
    assert done.returncode == 2 and b"Traceback" not in done.stderr
    done = subprocess.run(["sh", "-c", line + " -p x >&-"], capture_output=True)
    assert done.returncode == 2 and b"Traceback" not in done.stderr


def test_the_package_is_a_program() -> None:
    said = [
        subprocess.run([*words, "--version"], capture_output=True, check=True, timeout=60).stdout
        for words in (COMMAND, [sys.executable, "-m", "deskside"])
    ]
    assert said[0] == said[1] == f"deskside {version('deskside')}\n".encode()
    assert (resources.files("deskside") / "py.typed").is_file()


@pytest.mark.parametrize(
    "typed, word", [("deskside qu", "quantize"), ("deskside run --top-", "--top-k")]
)
def test_a_shell_completes_commands_and_flags(typed: str, word: str) -> None:
    asked = {
        "_DESKSIDE_COMPLETE": "complete_bash",
        "COMP_WORDS": typed,
        "COMP_CWORD": str(typed.count(" ")),
    }
    done = subprocess.run(COMMAND, env=os.environ | asked, capture_output=True, timeout=60)
    assert word in done.stdout.decode().split() and not done.stderr


def test_help_and_version() -> None:
    for arguments in (["--help"], ["run", "--help"], ["--version"]):
        done = deskside(*arguments)
        assert done.returncode == 0 and b"deskside" in done.stdout


def test_every_setting_has_one_flag() -> None:
    settings = [*fields(EngineConfig), *fields(SamplingParams)]
    assert set(OPTIONS) == {setting.name for setting in settings}
    assert list(MODEL) == [field.name for field in fields(ModelFlags)]
    for command in ("run", "perplexity", "bench"):  # one sequence at a time
        assert b"--parallel" not in inside(command, "--help").stdout
    assert b"--parallel" in inside("plan", "--help").stdout


def test_every_field_of_a_bench_request_has_one_flag() -> None:
    flags = [*TARGETS, *WORKLOAD, *RUNS]
    others = ["model", "options", "sampling"]  # flags that bench shares with other commands
    assert sorted(flags + others) == sorted(f.name for f in fields(Request))


def test_a_model_by_name_takes_only_flags_that_need_no_workload() -> None:
    for given, flag in [
        (("--no-ignore-eos",), "--ignore-eos"),
        (("-c", "512"), "--ctx-size"),
        (("-m", "x.gguf"), "--model"),
        (("-dev", "cuda0"), "--device"),
        (("-w", "article"), "--workload"),
    ]:
        refused("bench", "--preset", "tiny-moe", *given, part=f"{flag} has no meaning")
    refused("bench", "--layers", "4", part="--preset NAME")


def test_a_reader_that_goes_away_is_no_traceback(model: Path) -> None:
    command = [*COMMAND, "run", "-m", str(model), "-p", "x", "-n", "200", "--ignore-eos"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.read(1)
    process.stdout.close()
    assert b"Traceback" not in process.stderr.read()
    process.wait(60)


# ---- a terminal ---------------------------------------------------------------------------------


class Terminal:
    """A chat in a pseudo-terminal."""

    def __init__(self, *arguments: str) -> None:
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            os.environ["TERM"] = "dumb"
            os.execv(COMMAND[0], [*COMMAND, "run", *arguments])
        self.seen = ""

    def wait_for(self, text: str, seconds: float = 60) -> str:
        """Read until `text` appears behind what was waited for before."""
        end = time.monotonic() + seconds
        while text not in self.seen:
            assert time.monotonic() < end, f"no {text!r} in {self.seen!r}"
            try:
                self.seen += os.read(self.fd, 4096).decode("utf-8", "replace")
            except OSError:
                break
        before, found, self.seen = self.seen.partition(text)
        assert found, f"ended without {text!r}: {before!r}"
        return before

    def say(self, text: str) -> None:
        """Type at the prompt: before it, the terminal's own line editing would take Ctrl-D."""
        self.wait_for("> ")
        time.sleep(0.2)
        self.send(text)

    def send(self, text: str) -> None:
        os.write(self.fd, text.encode())

    def exit_code(self, seconds: float = 60) -> int:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.05)
        raise AssertionError("the program did not end")


@contextmanager
def chat(*arguments: str) -> Iterator[Terminal]:
    terminal = Terminal(*arguments)
    try:
        yield terminal
    finally:
        os.close(terminal.fd)
        try:
            os.kill(terminal.pid, signal.SIGKILL)
            os.waitpid(terminal.pid, 0)
        except (ProcessLookupError, ChildProcessError):
            pass


def test_ctrl_c_stops_the_answer_and_not_the_program(model: Path) -> None:
    with chat("-m", str(model), "--ignore-eos", "-c", "8192") as terminal:
        terminal.say("tell me everything\n")
        terminal.wait_for("\n")  # the echo
        time.sleep(1.0)
        terminal.send("\x03")
        terminal.wait_for("ended by stopped")
        terminal.say("\x03")
        terminal.wait_for("Ctrl-D ends")
        terminal.say("/exit\n")
        assert terminal.exit_code() == 0


def prompt_tokens(figures: str) -> int:
    """All of the prompt's, computed or cached, of `30 tokens (12 cached) at …`."""
    return sum(map(int, re.findall(r"(\d+) (?:tokens|cached)", figures.partition(" at ")[0])))


def test_a_conversation_goes_on_and_can_be_cleared(model: Path) -> None:
    with chat("-m", str(model), "-n", "4", "--temp", "0", "-c", "200") as terminal:
        terminal.say("one two three four five six seven eight nine ten\n")
        first = terminal.wait_for("ended by").split("prefill ")[1]
        terminal.say("and then\n")
        second = terminal.wait_for("ended by").split("prefill ")[1]
        assert int(second.split()[0]) != int(first.split()[0])
        terminal.say("many words " * 80 + "\n")
        terminal.wait_for("/clear starts anew")
        terminal.say("/clear\n")
        terminal.say("\n")
        terminal.say("one two three four five six seven eight nine ten\n")
        third = terminal.wait_for("ended by").split("prefill ")[1]
        assert prompt_tokens(third) == prompt_tokens(first)
        terminal.say("\x04")
        assert terminal.exit_code() == 0


def test_help_loads_neither_the_engine_nor_the_encoders() -> None:
    code = "import deskside.cli.app, sys; print('\\n'.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    loaded = set(done.stdout.decode().split())
    assert "deskside.engine.config" in loaded
    assert not {"deskside.engine.llm", "deskside.backends", "deskside.gguf.encoders"} & loaded
