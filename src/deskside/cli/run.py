"""`deskside run`: one answer, or a conversation."""

from __future__ import annotations

import contextlib
import io
import sys
from pathlib import Path
from typing import Annotated, Any

from typer import Option

from deskside.cli.escapes import as_bytes, as_text
from deskside.cli.flags import ENGINE, OPTIONS, SAMPLING, Given, Model, flags, takes
from deskside.console import err, note, progress_bar
from deskside.engine import LLM, Stream, Timings
from deskside.engine.config import PLACING, demo_model
from deskside.engine.sampler import SamplingParams
from deskside.errors import DesksideError

HELP = "/clear forgets the conversation, /exit or Ctrl-D ends, Ctrl-C stops an answer"


@takes(
    engine=flags(ENGINE, "ctx", "threads", "ubatch", "ctk", "ctv"),
    sampling=flags(
        SAMPLING,
        *("temperature", "top_k", "top_p", "min_p", "repeat_penalty", "repeat_last_n"),
        *("presence_penalty", "frequency_penalty", "seed", "logit_bias", "ignore_eos", "stop"),
    ),
    placing=flags(ENGINE, "isa", "numa", "huge_pages", "backend", *PLACING),
)
def run(
    *,
    model: Model = None,
    prompt: Annotated[
        str | None, Option("-p", "--prompt", help="answer this and exit; without it: chat")
    ] = None,
    file: Annotated[Path | None, Option("-f", "--file", help="read the prompt from a file")] = None,
    system: Annotated[
        str | None, Option("-sys", "--system-prompt", help="system message of the chat")
    ] = None,
    no_chat: Annotated[
        bool, Option("-no-cnv", "--no-chat", help="complete the prompt as plain text")
    ] = False,
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
        prompt = as_text(file.read_bytes(), str(file), escape=escape)
    elif prompt is not None:
        prompt = as_text(as_bytes(prompt), "-p", escape=escape)
    elif sys.stdin is None or not sys.stdin.isatty():
        prompt = as_text(sys.stdin.buffer.read() if sys.stdin else b"", "stdin")
    if system is not None:
        system = as_text(as_bytes(system), "-sys")
    _main(model, prompt, system, not no_chat, think, params, {**engine, **placing})


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
    model: Path | None,
    prompt: str | None,
    system: str | None,
    chat: bool,
    think: bool | None,
    params: SamplingParams,
    options: dict[str, Any],
) -> None:
    if prompt is not None and not prompt.strip():
        raise DesksideError("the prompt is empty: give some text with -p, -f or on stdin")
    if system is not None and not chat:
        raise DesksideError("-sys is a message of a chat: leave it out, or leave out --no-chat")

    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a locale that lacks a character shows "?"
    path = model or demo_model()
    with progress_bar() as progress:
        llm = LLM(path, progress=progress, **options)
    for line in llm.notes:
        note(line)
    if llm.config.threads > llm.config.n_threads:
        asked, running = llm.config.threads, llm.config.n_threads
        note(f"-t {asked} is more than the usable cores; running {running}")

    conversation = _Conversation(llm, system, think, params)
    if prompt is None:
        if not chat:
            raise DesksideError("--no-chat needs a prompt: -p, -f or stdin")
        name = llm.file.get("general.name", path.name)
        where = " and ".join(llm.plan.used) if llm.plan else llm.config.backend
        err.print(f"{name} on {where}, context {llm.ctx}. {HELP}", markup=False)
        conversation.loop()
    elif chat:
        conversation.answer(prompt)
    else:
        _show(llm.stream(prompt, params), [])


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

    def loop(self) -> None:
        with contextlib.suppress(ImportError):  # adds line editing to input()
            import readline  # noqa: F401

        while True:
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
                try:
                    self.answer(text)
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
