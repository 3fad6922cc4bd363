"""Chat messages in the shapes that templates read, and whether a prompt holds their text."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping
from typing import Any

from deskside.errors import DesksideError


def normalised(message: Any, name: str) -> dict[str, Any]:
    """A message with its content as text and its calls' arguments as objects."""
    if not isinstance(message, Mapping):
        raise DesksideError(f"{name}: a chat message is an object with role and content")
    content = message.get("content")
    message = dict(message)
    if isinstance(content, list | tuple):
        for part in content:
            if not isinstance(part, Mapping) or not isinstance(part.get("text"), str):
                kind = part.get("type") if isinstance(part, Mapping) else part
                raise DesksideError(
                    f"a message has a part of type {kind!r:.40}; deskside reads text only"
                )
        message["content"] = "".join(part["text"] for part in content)
    return map_calls(message, _with_object)


def in_parts(message: dict[str, Any]) -> dict[str, Any]:
    """A message with its content as a list of one part."""
    content = message.get("content")
    if not isinstance(content, str):
        return message
    return {**message, "content": [{"type": "text", "text": content}]}


def map_calls(
    message: dict[str, Any], change: Callable[[dict[str, Any]], dict[str, Any]]
) -> dict[str, Any]:
    """A message whose tool calls' functions went through `change`."""
    listed = message.get("tool_calls")
    if not isinstance(listed, list | tuple):
        return message

    def changed(call: Any) -> Any:
        if not isinstance(call, Mapping):
            return call
        if isinstance(call.get("function"), Mapping):
            return {**call, "function": change(dict(call["function"]))}
        return change(dict(call)) if "arguments" in call else call

    return {**message, "tool_calls": [changed(call) for call in listed]}


def calls(message: dict[str, Any]) -> list[dict[str, Any]]:
    """The functions of a message's tool calls."""
    found: list[dict[str, Any]] = []

    def keep(function: dict[str, Any]) -> dict[str, Any]:
        found.append(function)
        return function

    map_calls(message, keep)
    return found


def with_text(function: dict[str, Any]) -> dict[str, Any]:
    """A function whose arguments are JSON text, as on the wire."""
    return {**function, "arguments": json.dumps(function.get("arguments"), ensure_ascii=False)}


def _with_object(function: dict[str, Any]) -> dict[str, Any]:
    """OpenAI's wire form has the arguments as JSON text; templates iterate over them."""
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        with contextlib.suppress(ValueError, RecursionError):
            arguments = json.loads(arguments) if arguments.strip() else {}
    arguments = {} if arguments is None else arguments
    if not isinstance(arguments, dict):
        raise DesksideError(
            f"the arguments of the call of {function.get('name')!r:.40} are no JSON object"
        )
    return {**function, "arguments": arguments}


def holds(prompt: str, content: Any) -> bool:
    """Whether a prompt has a message's text; a template may trim it, change its white space or
    write it as JSON."""
    if not isinstance(content, str) or not (text := content.strip()) or text in prompt:
        return True
    if any(json.dumps(text, ensure_ascii=ascii)[1:-1] in prompt for ascii in (False, True)):
        return True
    return " ".join(text.split()) in " ".join(prompt.split())
