"""Chat messages to prompt text, by the jinja2 template that the model file carries."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
import weakref
from collections.abc import Mapping, Sequence
from numbers import Integral
from pathlib import Path
from typing import Any

from deskside.errors import DesksideError

_WORKER = Path(__file__).with_name("template_worker.py")

# Seconds to start Python and compile the template. It takes a tenth of a second, but the machine
# may be busy. A template that compiles slowly hits the process's own CPU limit first.
_START_SECONDS = 30.0

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


class ChatTemplate:
    """A chat template, compiled once and rendered in a process with limits (template_worker.py).

    source: the jinja2 text. bos_token, eos_token: spellings of the tokens, for the template.
    name: the file's name, for error messages. seconds: the time limit of a render.

    Thread-safe: renders take turns. It stays usable after a failed render.
    """

    def __init__(
        self,
        source: str,
        bos_token: str = "",
        eos_token: str = "",
        name: str = "chat template",
        *,
        seconds: float = 5.0,
    ) -> None:
        self.source = source
        self.name = name
        self._tokens = {"bos_token": bos_token, "eos_token": eos_token}
        self._seconds = seconds
        self._lock = threading.Lock()
        self._process = self._start()

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any], source: str) -> ChatTemplate:
        """The file's template; or ChatML, if the file has only ChatML's tokens."""
        tokens = metadata.get("tokenizer.ggml.tokens")
        pieces = tokens if isinstance(tokens, list) else []

        def spelling(key: str) -> str:
            token = metadata.get(f"tokenizer.ggml.{key}_token_id")
            index = int(token) if isinstance(token, Integral) else -1
            return str(pieces[index]) if 0 <= index < len(pieces) else ""

        template = metadata.get("tokenizer.chat_template")
        if template is None and "<|im_start|>" in pieces:
            template = CHATML
        if template is None:
            raise DesksideError(
                f"{source}: no tokenizer.chat_template and no <|im_start|> token, so this model "
                "has no chat format: give it plain text to complete instead"
            )
        if not isinstance(template, str):
            raise DesksideError(f"{source}: tokenizer.chat_template must be a string")
        return cls(template, spelling("bos"), spelling("eos"), source)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        enable_thinking: bool | None = None,
        **extra: Any,
    ) -> str:
        """The prompt's text, to be encoded with special=True, add_bos=False.

        messages: {"role": …, "content": …, …} as in the OpenAI API, except that the arguments of a
        tool call are an object. enable_thinking: None leaves it to the template. extra: further
        variables. Everything must be JSON.
        """
        variables = {
            **self._tokens,
            "messages": messages,
            "add_generation_prompt": add_generation_prompt,
            "tools": tools,
            "documents": None,
            **extra,
        }
        if enable_thinking is not None:
            variables["enable_thinking"] = enable_thinking
        try:
            request = json.dumps(variables)
        except (TypeError, ValueError, RecursionError) as error:
            raise DesksideError(f"messages and tools must be plain JSON: {error}") from None
        with self._lock:
            if self._process.poll() is not None:
                self._process = self._start()
            return self._ask(self._process, request, self._seconds)

    def _start(self) -> subprocess.Popen[str]:
        try:
            process = subprocess.Popen(
                # -P: modules of this package must not shadow those of the standard library.
                [sys.executable, "-P", str(_WORKER)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
                start_new_session=True,  # Ctrl-C in the terminal must not reach it
                encoding="ascii",
            )
        except OSError as error:
            raise DesksideError(
                f"{self.name}: cannot start the chat template's process: {error}"
            ) from None
        weakref.finalize(self, _stop, process)
        self._ask(process, json.dumps(self.source), _START_SECONDS)
        return process

    def _ask(self, process: subprocess.Popen[str], request: str, seconds: float) -> str:
        """One request, one reply. After an error the process is stopped, or ready for the next."""
        assert process.stdin is not None and process.stdout is not None
        timer = threading.Timer(seconds, process.kill)
        timer.start()
        try:
            process.stdin.write(request + "\n")
            process.stdin.flush()
            reply = json.loads(process.stdout.readline())
        except (OSError, ValueError):
            _stop(process)
            raise DesksideError(
                f"{self.name}: the chat template takes too much time or memory; it was stopped"
            ) from None
        except BaseException:
            _stop(process)
            raise
        finally:
            timer.cancel()
        if "error" not in reply:
            return str(reply["text"])
        raise DesksideError(self._message(reply))

    def _message(self, reply: Mapping[str, Any]) -> str:
        reason = " ".join(str(reply["message"]).split())
        if reply["error"] == "refused":
            return f"{self.name}: the chat template refuses these messages: {reason}"
        problem = "has an error" if reply["error"] == "syntax" else "failed"
        where = "" if reply["line"] is None else f" on line {reply['line']}"
        return f"{self.name}: the chat template {problem}{where}: {reason}"


def _stop(process: subprocess.Popen[str]) -> None:
    process.kill()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError):  # closing would flush into a closed pipe
                pipe.close()
    process.wait()
