"""Typed data from files: checked against a type, or refused in one line that names the field.

The type is a `msgspec.Struct`, a dataclass or anything else that msgspec checks; limits of a value
are `msgspec.Meta` in its annotation, whose `description` says what is expected where that is
clearer than the type.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import re
import sys
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_type_hints

import msgspec

from deskside.errors import DesksideError

T = TypeVar("T")

# Also refuses NaN and infinity, which compare with nothing.
Finite = Annotated[
    float,
    msgspec.Meta(
        ge=-sys.float_info.max, le=sys.float_info.max, description="a number that is finite"
    ),
]
Positive = Annotated[
    float, msgspec.Meta(gt=0, le=sys.float_info.max, description="a number above 0")
]
Name = Annotated[str, msgspec.Meta(min_length=1, description="text that is not empty")]

_WORDS = {
    "int": "a whole number",
    "float": "a number",
    "str": "text",
    "bool": "true or false",
    "array": "a list",
    "object": "an object",
    "null": "nothing",
}
_REASON = re.compile(r"(?P<what>.*?)(?: - at (?P<key>`key` in )?`\$(?P<path>.*)`)?", re.DOTALL)
_STEP = re.compile(r"\.(\w+)|\[(\d+|\.\.\.)\]")
_UNKNOWN = object()  # a value that the error does not locate


def parse(path: Path, suffix: str = "", what: str = "") -> Any:
    """The values of a file; its suffix, or `suffix`, says .toml, .yaml or .yml, any other JSON.

    DesksideError names the file and what is wrong. what: what the file should be, for that message.
    OSError where the file cannot be read.
    """
    suffix = suffix or path.suffix
    kind = what or {".toml": "TOML", ".yaml": "YAML", ".yml": "YAML"}.get(suffix, "JSON")
    raw = path.read_bytes()
    try:
        if suffix == ".toml":
            return tomllib.loads(raw.decode())
        if suffix in (".yaml", ".yml"):
            return _yaml(raw.decode(), path)
        return msgspec.json.decode(raw)
    except UnicodeDecodeError:
        raise DesksideError(f"{path}: not {kind}: is not UTF-8 text") from None
    except RecursionError:
        raise DesksideError(f"{path}: not {kind}: nested too deeply") from None
    except ValueError as failure:  # of TOML and of JSON, too
        raise DesksideError(f"{path}: not {kind}: {failure}") from None


def _yaml(text: str, path: Path) -> Any:
    try:
        import yaml
    except ImportError:
        raise DesksideError(f"{path}: YAML needs: pip install 'deskside[bench]'") from None
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as failure:
        raise ValueError(" ".join(str(failure).split())) from None


def build(data: Any, kind: type[T], where: str) -> T:
    """`data`, as a parser gives it, made into `kind`.

    DesksideError names `where`, the field, its value and what was expected.
    """
    try:
        return msgspec.convert(data, kind)
    except msgspec.ValidationError as failure:
        raise DesksideError(f"{where}: {_explain(str(failure), data, kind)}") from None
    except DesksideError as failure:  # of a check across fields
        raise DesksideError(f"{where}: {failure}") from None


def check_fields(instance: Any, flags: Mapping[str, str] = {}) -> None:
    """Check every field of a dataclass against its annotation; DesksideError names the field.

    flags: what a field is called on the command line, where that is clearer. Numbers of NumPy are
    numbers.
    """
    for name, kind in _hints(instance.__class__).items():
        value = getattr(instance, name)
        with contextlib.suppress(TypeError):
            value = msgspec.to_builtins(value, builtin_types=(bytes,), enc_hook=_plain)
        try:
            msgspec.convert(value, kind)
        except msgspec.ValidationError as failure:
            raise DesksideError(
                _explain(str(failure), value, kind, flags.get(name, name))
            ) from None


def _plain(value: Any) -> Any:
    """A number of NumPy as one of Python."""
    if not hasattr(value, "item"):
        raise TypeError(type(value))
    return value.item()


@functools.cache
def _hints(kind: type) -> dict[str, Any]:
    hints = get_type_hints(kind, include_extras=True)
    return {f.name: hints[f.name] for f in dataclasses.fields(kind)}


def _explain(message: str, data: Any, kind: Any, root: str = "") -> str:
    """Our words for msgspec's message about `data`; `root` is the name of data itself."""
    found = _REASON.fullmatch(message)
    assert found is not None
    what, path = found["what"], found["path"] or ""
    field = (root + path).lstrip(".")
    value, info, description = _follow(path, data, msgspec.inspect.type_info(kind))
    if named := re.fullmatch(r"Object contains unknown field `(.*)`", what, re.DOTALL):
        known = ", ".join(f.encode_name for f in info.fields)
        return (
            f"{field + ': ' if field else ''}unknown field {named[1]!r:.60}; the fields are {known}"
        )
    if named := re.fullmatch(r"Object missing required field `(.*)`", what):
        return f"{field + ': ' if field else ''}field {named[1]!r} is missing"
    if isinstance(info, msgspec.inspect.LiteralType):
        expected = " or ".join(f'"{v}"' for v in info.values)
    elif found["key"]:
        value, expected = _UNKNOWN, f"a key that is {_in_words(what)}"
    else:
        expected = description or _in_words(what)
    if value is _UNKNOWN:
        return f"{field}: expected {expected}".removeprefix(": ")
    return f"{field} is {value!r:.60}; expected {expected}".lstrip()


def _in_words(what: str) -> str:
    """msgspec's "Expected `int | null`, got `str`" as "a whole number or nothing"."""
    if what == "Number out of range":
        return "a number that is not too large"
    expected = re.match(r"Expected `(.*?)`(?:, got `.*`)?(.*)", what, re.DOTALL)
    if expected is None:
        return what
    kinds = [_WORDS.get(kind, kind) for kind in expected[1].split(" | ")]
    return " or ".join(kinds) + expected[2]


def _follow(path: str, value: Any, info: Any) -> tuple[Any, Any, str]:
    """The value and msgspec's type at the end of a path, and that type's description."""
    description = ""
    for step in [None, *_STEP.finditer(path)]:
        if step is not None:
            value = _step(value, step)
            fields = {f.encode_name: f.type for f in getattr(info, "fields", ())}
            info = fields[step[1]] if step[1] in fields else _items(info)
        description = ""
        while isinstance(info, msgspec.inspect.Metadata | msgspec.inspect.UnionType):
            if isinstance(info, msgspec.inspect.UnionType):
                kept = [t for t in info.types if not isinstance(t, msgspec.inspect.NoneType)]
                info = kept[0]
            else:
                description = (info.extra_json_schema or {}).get("description", description)
                info = info.type
    return value, info, description


def _step(value: Any, step: re.Match[str]) -> Any:
    if value is _UNKNOWN or step[2] == "...":
        return _UNKNOWN
    return value[step[1]] if step[1] else value[int(step[2])]


def _items(info: Any) -> Any:
    """The type of a list's items or of a mapping's values."""
    return getattr(info, "item_type", None) or getattr(info, "value_type", info)
