"""`deskside run`: one answer, or a conversation."""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option

from deskside.cli.escapes import as_bytes, as_text
from deskside.cli.flags import ENGINE, OPTIONS, SAMPLING, Given, flags, takes
from deskside.cli.model import model_file, model_flags, with_source
from deskside.console import err, note, progress_bar
from deskside.engine.config import PLACING, demo_model
from deskside.engine.sampler import SamplingParams
from deskside.errors import DesksideError

if TYPE_CHECKING:
    from deskside.engine import LLM, Stream, Timings

HELP = "/clear forgets the conversation, /exit or Ctrl-D ends, Ctrl-C stops an answer"


@takes(
    model=model_flags(),
    engine=flags(ENGINE, "ctx", "threads", "threads_batch", "ubatch", "batch", "ctk", "ctv"),
    sampling=flags(
        SAMPLING,
        *("temperature", "top_k", "top_p", "min_p", "repeat_penalty", "repeat_last_n"),
        *("presence_penalty", "frequency_penalty", "seed", "logit_bias", "ignore_eos", "stop"),
    ),
    placing=flags(ENGINE, "isa", "numa", "huge_pages", "backend", *PLACING),
)
def run(
    *,
    source: Annotated[
        Path | None, Argument(metavar="MODEL.gguf", help="as -m", show_default=False)
    ] = None,
    model: Given,
    prompt: Annotated[
        str | None,
        Option("-p", "--prompt", help="answer this and exit, or go on with -cnv; without it: chat"),
    ] = None,
    file: Annotated[Path | None, Option("-f", "--file", help="read the prompt from a file")] = None,
    system: Annotated[
        str | None, Option("-sys", "--system-prompt", help="system message of the chat")
    ] = None,
    system_file: Annotated[
        Path | None,
        Option("-sysf", "-spf", "--system-prompt-file", help="read the system message from a file"),
    ] = None,
    chat: Annotated[
        bool | None,
        Option(
            "-cnv/-no-cnv",
            "--conversation/--no-conversation",
            "--chat/--no-chat",
            help="chat, even with a prompt; or complete the prompt as plain text",
            show_default="one answer in the chat template",
        ),
    ] = None,
    single: Annotated[bool, Option("-st", "--single-turn", help="end after one answer")] = False,
    think: Annotated[
        bool | None, Option("--think/--no-think", help="enable_thinking of the chat template")
    ] = None,
    escape: Annotated[
        bool,
        Option("-e", "--escape/--no-escape", help=r"\n, \t, \xHH and such in -p, -f and -r"),
    ] = True,
    n_predict: Annotated[int, OPTIONS["max_tokens"]] = -1,
    engine: Given,
    sampling: Given,
    placing: Given,
) -> None:
    """Chat with a model, or complete one prompt (-p, -f or piped text)."""
    bias = dict(map(_logit_bias, sampling.get("logit_bias", ())))
    stop = [as_text(as_bytes(text), "-r", escape=escape) for text in sampling.get("stop", ())]
    params = SamplingParams(
        **{**sampling, "max_tokens": n_predict, "logit_bias": bias, "stop": stop}
    )
    if prompt is not None and file is not None:
        raise DesksideError("-p and -f both give a prompt; use one of them")
    if file is not None:
        prompt = as_text(_read(file), str(file), escape=escape)
    elif prompt is not None:
        prompt = as_text(as_bytes(prompt), "-p", escape=escape)
    elif sys.stdin is None or not sys.stdin.isatty():
        prompt = as_text(sys.stdin.buffer.read() if sys.stdin else b"", "stdin")
    if system is not None and system_file is not None:
        raise DesksideError("-sys and -sysf both give a system message; use one of them")
    if system_file is not None:
        system = as_text(_read(system_file), str(system_file))
    elif system is not None:
        system = as_text(as_bytes(system), "-sys")
    model = with_source(source, model)
    turns = Turns(chat is not False, single or (prompt is not None and chat is None))
    _main(model, prompt, system, turns, think, params, {**engine, **placing})


def _read(file: Path) -> bytes:
    """A file without its last line's end, as llama.cpp reads one."""
    return file.read_bytes().removesuffix(b"\n")


@dataclass(frozen=True)
class Turns:
    """chat: by the chat template, else plain text. single: one answer ends it."""

    chat: bool
    single: bool


def _logit_bias(entry: str) -> tuple[int, float]:
    """Parse llama.cpp's form of a bias: TOKEN_ID, then + or -, then a number."""
    for sign in "+-":
        token, found, bias = entry.partition(sign)
        if found:
            try:
                return int(token), float(sign + bias)
            except ValueError:
                break
    raise DesksideError(f"--logit-bias {entry}: expected ID+BIAS or ID-BIAS, such as 15043+1")


def _main(
    model: Given,
    prompt: str | None,
    system: str | None,
    turns: Turns,
    think: bool | None,
    params: SamplingParams,
    options: dict[str, Any],
) -> None:
    from deskside.engine import LLM  # and with it the backends, which --help needs not

    if prompt is not None and not prompt.strip():
        raise DesksideError("the prompt is empty: give some text with -p, -f or on stdin")
    if system is not None and not turns.chat:
        raise DesksideError("-sys is a message of a chat: leave it out, or leave out -no-cnv")

    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a locale that lacks a character shows "?"
    path = model_file(model) or demo_model()
    with progress_bar() as progress:
        llm = LLM(path, progress=progress, **options)
    for line in llm.notes:
        note(line)
    conversation = _Conversation(llm, system, think, params)
    if not turns.chat:
        if prompt is None:
            raise DesksideError("-no-cnv needs a prompt: -p, -f or stdin")
        _show(llm.stream(prompt, params), [])
    elif prompt is not None and turns.single:
        conversation.answer(prompt)
    else:
        name = llm.file.get("general.name", path.name)
        where = " and ".join(llm.plan.used) if llm.plan else llm.config.backend
        err.print(f"{name} on {where}, context {llm.ctx}. {HELP}", markup=False)
        conversation.loop(prompt, single=turns.single)


class _Conversation:
    """The messages of a chat. If an answer is stopped, its text so far is kept."""

    def __init__(
        self, llm: LLM, system: str | None, think: bool | None, params: SamplingParams
    ) -> None:
        self.llm = llm
        self.params = params
        self.think = think
        self.start = [] if system is None else [{"role": "system", "content": system}]
        self.messages = list(self.start)

    def answer(self, text: str) -> None:
        messages = [*self.messages, {"role": "user", "content": text}]
        prompt = self.llm.prompt(messages, enable_thinking=self.think)
        stream = self.llm.stream(prompt, self.params)
        pieces = ["<think>\n"] if prompt.thinks else []
        try:
            _show(stream, pieces)
        finally:
            answer = {"role": "assistant", "content": "".join(pieces)}
            self.messages = [*messages, answer]

    def loop(self, first: str | None = None, *, single: bool = False) -> None:
        """Answer `first`, then what is typed, until the user ends it.

        single: end after one answer.
        """
        with contextlib.suppress(ImportError):  # adds line editing to input()
            import readline  # noqa: F401

        if first is not None:
            with _stoppable():
                self.answer(first)
        while not (single and len(self.messages) > len(self.start)):
            try:
                text = input("> ").strip()
            except EOFError:
                err.print()
                return
            except KeyboardInterrupt:
                err.print(f"\n{HELP}", style="dim")
                continue
            # Bytes that are not UTF-8 arrive as surrogates.
            text = text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
            if text == "/exit":
                return
            if text == "/clear":
                self.messages = list(self.start)
            elif text in ("/help", "/?"):
                err.print(HELP)
            elif text:
                with _stoppable():
                    self.answer(text)


@contextlib.contextmanager
def _stoppable() -> Iterator[None]:
    """Of one answer: neither Ctrl-C nor a failure ends the conversation."""
    try:
        yield
    except DesksideError as failure:
        err.print(f"{failure} (/clear starts anew)", style="red", markup=False)
    except KeyboardInterrupt:
        err.print("stopped", style="dim")


def _show(stream: Stream, pieces: list[str]) -> None:
    """Print an answer as it comes, then its speeds. Ctrl-C ends it. `pieces` collects the text."""
    stopped = False
    try:
        for chunk in stream:
            pieces.append(chunk.text)
            sys.stdout.write(chunk.text)
            sys.stdout.flush()
    except KeyboardInterrupt:
        stopped = True
    sys.stdout.write("\n")
    sys.stdout.flush()
    err.print(_figures(stream.timings, "stopped" if stopped else stream.stop_reason), style="dim")
    if (offload := stream.llm.offload_metrics()) is not None:
        err.print(
            f"offloaded experts: {100 * offload.hit_rate:.0f} % of decode's, "
            f"{offload.streamed} streamed",
            style="dim",
        )


def _figures(t: Timings, reason: str) -> str:
    if not t.prompt_seconds:
        return f"ended by {reason} during prefill"
    cached = f" ({t.cached_tokens} cached)" if t.cached_tokens else ""
    prefill = f"prefill {t.prompt_tokens} tokens{cached} at {t.prefill_rate:.1f} tok/s"
    decode = f"decode {t.generated_tokens} tokens"
    if t.decode_rate:
        decode += f" at {t.decode_rate:.1f} tok/s"
    first = f"first token after {t.first_seconds:.2f} s"
    return " | ".join((prefill, first, decode, f"ended by {reason}"))
