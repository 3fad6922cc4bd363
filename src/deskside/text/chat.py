"""Chat messages to prompt text, by the jinja2 template that the model file carries."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
import warnings
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import Any

from deskside.errors import DesksideError
from deskside.text.messages import calls, holds, in_parts, map_calls, normalised, with_text

_WORKER = Path(__file__).with_name("template_worker.py")

# Seconds to start Python and compile the template. It takes a tenth of a second, but the machine
# may be busy. A template that compiles slowly hits the process's own CPU limit first.
_START_SECONDS = 30.0

_MARK = "zqxjkvbpyg"  # text that no template holds
# Roles whose text a prompt must hold. The assistant's thinking and what tools return, a template
# may drop or encode.
_KEPT = ("system", "developer", "user")

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


@dataclass(frozen=True)
class _Traits:
    """What a template was found to do.

    parts: roles whose `content` it reads as a list of parts, not as text. opener: of the
    assistant's turn, where the template does not write it when it is asked to.
    """

    parts: frozenset[str] = frozenset()
    opener: str = ""


class _Stopped(DesksideError):
    """A render went past its limits."""


class ChatTemplate:
    """A chat template, compiled once and rendered in a process with limits (template_worker.py).

    source: the jinja2 text. bos_token, eos_token: spellings of the tokens, for the template.
    name: the file's name, for error messages. seconds: the time limit of a render.

    Thread-safe: renders take turns. It stays usable after a failed render, and after a fork.
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
        self._traits: _Traits | None = None
        self._lock = threading.Lock()
        self._pid = os.getpid()
        self._process = self._start()

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any], source: str) -> ChatTemplate:
        """The file's template; ChatML, if it has none or an empty one, but ChatML's tokens."""
        tokens = metadata.get("tokenizer.ggml.tokens")
        pieces = tokens if isinstance(tokens, list) else []

        def spelling(key: str) -> str:
            token = metadata.get(f"tokenizer.ggml.{key}_token_id")
            index = int(token) if isinstance(token, Integral) else -1
            return str(pieces[index]) if 0 <= index < len(pieces) else ""

        template = metadata.get("tokenizer.chat_template")
        if isinstance(template, str) and not template.strip():
            template = None
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

        messages: {"role": …, "content": …, …} as in the OpenAI API. `content` may be text or a list
        of parts, the arguments of a tool call an object or JSON text: the template gets the shape
        that it reads. enable_thinking: None leaves it to the template. extra: further variables.
        Everything must be JSON.

        DesksideError if the template fails, or leaves out a text of the user or the system.
        """
        variables = {
            **self._tokens,
            "add_generation_prompt": add_generation_prompt,
            "tools": tools,
            "documents": None,
            **extra,
        }
        if enable_thinking is not None:
            variables["enable_thinking"] = enable_thinking
        plain = [normalised(message, self.name) for message in messages]
        if self._traits is None:
            self._traits = self._probe()
        shaped = [in_parts(m) if m.get("role") in self._traits.parts else m for m in plain]
        text = self._with_arguments(shaped, variables)
        for message in plain:
            if message.get("role") in _KEPT and not holds(text, message.get("content")):
                raise DesksideError(
                    f"{self.name}: the chat template leaves out the text of the "
                    f"{message['role']}'s message; drop that message, or complete plain text"
                )
        return text + self._traits.opener if add_generation_prompt else text

    def _with_arguments(self, messages: Sequence[dict[str, Any]], variables: dict[str, Any]) -> str:
        """Rendered with tool calls' arguments as objects; as JSON text, if the template fails on
        objects or writes Python's spelling of them."""
        made = [call for m in messages for call in calls(m)]
        failure = None
        try:
            text = self._render({**variables, "messages": messages})
            if not any(c["arguments"] and str(c["arguments"]) in text for c in made):
                return text
        except DesksideError as error:
            if not made:
                raise
            failure = error
        as_text = [map_calls(m, with_text) for m in messages]
        try:
            return self._render({**variables, "messages": as_text})
        except DesksideError as error:
            raise (failure or error) from None

    def _probe(self) -> _Traits:
        """How the template treats a text of one message. What it cannot tell stays as usual."""
        user, parts = _said("user"), set[str]()

        def tried(*messages: dict[str, Any], prompt: bool = False) -> str:
            variables = {**self._tokens, "tools": None, "documents": None, "messages": messages}
            try:
                return self._render({**variables, "add_generation_prompt": prompt})
            except _Stopped:
                raise
            except DesksideError:
                return ""

        without = tried(user)
        if _MARK not in without and _MARK in (text := tried(in_parts(user))):
            user, without = in_parts(user), text
            around = {r: (user, _said(r)) for r in ("assistant", "tool")}
            around["system"] = (_said("system"), user)
            # The mark is there once for the user and once more.
            parts = {"user"} | {r for r, m in around.items() if tried(*m).count(_MARK) < 2}
        found = _Traits(frozenset(parts))
        if not without or tried(user, prompt=True) != without:
            return found
        # It ignores add_generation_prompt. Many formats need no opener; but what it writes before
        # an assistant's message, the model expects.
        answer = _said("assistant", 2 * _MARK)
        longer = tried(user, in_parts(answer) if "assistant" in parts else answer)
        opener, answered, _ = longer.removeprefix(without).partition(2 * _MARK)
        opener = opener.partition("<think>")[0]
        if not longer.startswith(without) or not answered or not opener.strip():
            return found
        warnings.warn(
            f"{self.name}: the chat template leaves out the assistant's opener; it is added",
            stacklevel=4,
        )
        return _Traits(found.parts, opener)

    def _render(self, variables: Mapping[str, Any]) -> str:
        try:
            request = json.dumps(variables)
        except (TypeError, ValueError, RecursionError) as error:
            raise DesksideError(f"messages and tools must be plain JSON: {error}") from None
        if os.getpid() != self._pid:  # forked: the process is the parent's
            self._lock, self._pid = threading.Lock(), os.getpid()
            self._process = self._start()
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
        weakref.finalize(self, _stop_own, process, os.getpid())
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
            raise _Stopped(
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


def _said(role: str, content: str = _MARK) -> dict[str, Any]:
    return {"role": role, "content": content}


def _stop_own(process: subprocess.Popen[str], pid: int) -> None:
    """Not in a process that was forked later: there it is the parent's."""
    if os.getpid() == pid:
        _stop(process)


def _stop(process: subprocess.Popen[str]) -> None:
    process.kill()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError):  # closing would flush into a closed pipe
                pipe.close()
    process.wait()
