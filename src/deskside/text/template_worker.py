"""The process that renders a chat template: jinja2's sandbox, within limits of the kernel.

A model file's template is a stranger's program. Jinja2's sandbox keeps it from Python's internals,
but not from `'a' * 10**10` or an endless loop. No check inside the interpreter can stop a single C
call that takes all memory. So this process compiles and renders the template. It may use MEMORY
bytes, and SECONDS of CPU per request. `chat.py` talks to it over pipes.

Requests and replies are JSON lines. The first request is the template's source, a string. Every
further request is an object: the variables to render with. A reply is {"text": …}, or
{"error": kind, "message": …, "line": number or null}. The kind is "syntax", "refused" (the template
called raise_exception) or "failed".

It runs as a script and imports nothing of deskside, so it starts in a tenth of a second.
"""

from __future__ import annotations

import json
import resource
import sys
import time
import traceback
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from jinja2 import TemplateSyntaxError, Undefined, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

MEMORY = 1 << 29
SECONDS = 5
# A million tokens of text are about 4 MB.
MAX_OUTPUT = 1 << 26
MAX_MESSAGE = 300


class Refused(Exception):
    """The template called raise_exception."""


class Generation(Extension):
    """HF's `{% generation %}…{% endgeneration %}`, marks for training: renders its body."""

    tags = {"generation"}  # noqa: RUF012 (as the base class has it)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def raise_exception(message: object) -> None:
    raise Refused(str(message))


def to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """HF's `tojson`: plain JSON. Jinja2's own escapes HTML and sorts keys."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


class Sandbox(ImmutableSandboxedEnvironment):
    """Reading an unsafe attribute fails at once; jinja2's own sandbox waits until it is used."""

    def unsafe_undefined(self, obj: Any, attribute: str) -> Undefined:
        kind = type(obj).__name__
        raise SecurityError(f"access to attribute {attribute!r} of a {kind!r} is unsafe")


def environment() -> Sandbox:
    env = Sandbox(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=["jinja2.ext.loopcontrols", Generation],
    )
    env.filters["tojson"] = to_json
    env.globals["raise_exception"] = raise_exception
    env.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return env


def render(template: Any, variables: Mapping[str, Any]) -> str:
    pieces, size = [], 0
    for piece in template.generate(variables):
        pieces.append(piece)
        size += len(piece)
        if size > MAX_OUTPUT:
            raise MemoryError
    return "".join(pieces)


def template_line(error: BaseException) -> int | None:
    """The template's line that failed. Jinja2 gives its frames the source's line numbers."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename in ("<template>", "<unknown>")]
    return lines[-1] if lines else None


def failure(error: BaseException) -> dict[str, Any]:
    """The reply that reports `error`."""
    kind, line = "failed", template_line(error)
    message = str(error) or type(error).__name__
    if isinstance(error, TemplateSyntaxError):
        kind, message, line = "syntax", error.message or message, error.lineno
    elif isinstance(error, Refused):
        kind = "refused"
    elif isinstance(error, MemoryError):
        message = "it makes too much text or data"
    elif isinstance(error, RecursionError):
        message = "it is nested or recurses too deeply"
    return {"error": kind, "message": message[:MAX_MESSAGE], "line": line}


def answer(request: Any, state: dict[str, Any]) -> dict[str, Any]:
    try:
        if isinstance(request, str):
            state["template"] = environment().from_string(request)
            return {"text": ""}
        return {"text": render(state["template"], request)}
    except Exception as error:
        return failure(error)


def limit(kind: int, amount: int) -> None:
    hard = resource.getrlimit(kind)[1]
    if hard != resource.RLIM_INFINITY:
        amount = min(amount, hard)
    resource.setrlimit(kind, (amount, hard))


def main() -> None:
    limit(resource.RLIMIT_AS, MEMORY)
    state: dict[str, Any] = {}
    for line in sys.stdin:
        # The kernel counts whole seconds over the life of the process, and kills it past the limit.
        limit(resource.RLIMIT_CPU, int(time.process_time()) + SECONDS + 1)
        print(json.dumps(answer(json.loads(line), state)), flush=True)


if __name__ == "__main__":
    main()
