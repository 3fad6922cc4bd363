"""Extract documented functions, classes and modules of the standard library."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from corpus import SourceFile, words

# C modules have no Python source; their docstrings are read from the live objects.
LIVE_MODULES = words(
    "builtins math cmath itertools time sys operator struct zlib binascii array select errno gc "
    "collections functools random os marshal _thread atexit unicodedata"
)
LIVE_TYPES = (str, bytes, bytearray, list, dict, set, frozenset, tuple, int, float, complex)
# The name a user knows, for modules that are re-exported under another one.
ALIASES = {
    "posixpath": "os.path",
    "genericpath": "os.path",
    "json.decoder": "json",
    "json.encoder": "json",
    "concurrent.futures._base": "concurrent.futures",
    "concurrent.futures.thread": "concurrent.futures",
    "concurrent.futures.process": "concurrent.futures",
}
# Methods of these classes are also functions of their module.
MODULE_LEVEL = {"random.Random": "random"}
POPULAR = set(
    words(
        "builtins os os.path json re math random string textwrap shutil pathlib collections "
        "itertools functools datetime time subprocess sys csv copy heapq bisect statistics glob "
        "tempfile logging argparse threading contextlib dataclasses enum fractions decimal "
        "operator pprint zipfile urllib.parse urllib.request base64 hashlib types typing inspect "
        "io queue socket unittest str list dict set tuple bytes int float"
    )
)


@dataclass
class Api:
    """One documented object. ``name`` is dotted and as a user would write it."""

    name: str
    kind: str  # "module", "class", "function", "method" or "exception"
    doc: str
    signature: str | None = None  # "(a, b=1)" without self
    parameters: list[tuple[str, str | None]] = field(default_factory=list)  # name, default
    source: str | None = None  # of short top-level functions
    members: list[str] = field(default_factory=list)  # public functions and classes of a module
    base: str | None = None  # first base class

    @property
    def module(self) -> str:
        return self.name.rpartition(".")[0] if self.kind != "module" else self.name

    @property
    def popular(self) -> bool:
        return self.module in POPULAR or self.module.rpartition(".")[0] in POPULAR


def is_public(name: str) -> bool:
    return not name.startswith("_")


def from_sources(files: Iterable[SourceFile]) -> Iterator[Api]:
    """Objects of the pure-Python library, by parsing (nothing is imported)."""
    for file in files:
        parts = file.module.split(".")
        module = ALIASES.get(file.module, file.module)
        if file.is_test or (file.module not in ALIASES and not all(map(is_public, parts))):
            continue
        if parts[0] in ("idlelib", "lib2to3", "distutils"):
            continue
        try:
            tree = ast.parse(file.text)
        except SyntaxError:
            continue
        yield from from_tree(tree, module, file.text)


def from_tree(tree: ast.Module, module: str, text: str) -> Iterator[Api]:
    definitions = [
        node
        for node in tree.body
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        and is_public(node.name)
    ]
    doc = ast.get_docstring(tree)
    if doc:
        yield Api(module, "module", doc, members=list(dict.fromkeys(d.name for d in definitions)))
    for node in definitions:
        if isinstance(node, ast.ClassDef):
            yield from from_class(node, module)
        elif doc := ast.get_docstring(node):
            source = ast.get_source_segment(text, node)
            short = source is not None and source.count("\n") < 25 and len(source) < 1200
            yield from_function(
                node, f"{module}.{node.name}", "function", doc, source if short else None
            )


def from_class(node: ast.ClassDef, module: str) -> Iterator[Api]:
    base = ast.unparse(node.bases[0]) if node.bases else None
    doc = ast.get_docstring(node)
    if doc:
        is_error = bool(re.search(r"(Error|Exception|Warning)$", f"{node.name}"))
        kind = "exception" if is_error else "class"
        yield Api(f"{module}.{node.name}", kind, doc, base=base)
    owner = MODULE_LEVEL.get(f"{module}.{node.name}", f"{module}.{node.name}")
    for item in node.body:
        if not isinstance(item, ast.FunctionDef | ast.AsyncFunctionDef) or not is_public(item.name):
            continue
        if method_doc := ast.get_docstring(item):
            yield from_function(item, f"{owner}.{item.name}", "method", method_doc)


def from_function(
    node: ast.FunctionDef | ast.AsyncFunctionDef,
    name: str,
    kind: str,
    doc: str,
    source: str | None = None,
) -> Api:
    arguments = node.args
    positional = arguments.posonlyargs + arguments.args
    defaults: list[ast.expr | None] = [None] * (len(positional) - len(arguments.defaults))
    pairs = list(zip(positional, [*defaults, *arguments.defaults], strict=True))
    if kind == "method" and pairs and pairs[0][0].arg in ("self", "cls"):
        pairs = pairs[1:]
    pairs += list(zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True))
    parameters = [(arg.arg, ast.unparse(value) if value else None) for arg, value in pairs]
    shown = [arg if value is None else f"{arg}={value}" for arg, value in parameters]
    if arguments.vararg:
        shown.insert(len(shown) - len(arguments.kwonlyargs), f"*{arguments.vararg.arg}")
    if arguments.kwarg:
        shown.append(f"**{arguments.kwarg.arg}")
    return Api(name, kind, doc, f"({', '.join(shown)})", parameters, source)


def from_live_objects() -> Iterator[Api]:
    """Objects implemented in C: built-in functions, types and their methods, C modules."""
    for module_name in LIVE_MODULES:
        module = importlib.import_module(module_name)
        prefix = "" if module_name == "builtins" else f"{module_name}."
        if module.__doc__ and prefix:
            members = [n for n, v in dict(vars(module)).items() if is_public(n) and callable(v)]
            yield Api(module_name, "module", inspect.cleandoc(module.__doc__), members=members)
        for name, value in dict(vars(module)).items():
            is_python = inspect.isfunction(value) or inspect.ismodule(value)
            if is_public(name) and callable(value) and not is_python and value.__doc__:
                yield from from_live(f"{prefix}{name}", value)
    for owner in LIVE_TYPES:
        for name, value in vars(owner).items():
            if is_public(name) and callable(value) and value.__doc__:
                yield from from_live(f"{owner.__name__}.{name}", value, "method")


def from_live(name: str, value: object, kind: str = "function") -> Iterator[Api]:
    doc = inspect.cleandoc(value.__doc__ or "")
    if inspect.isclass(value):
        is_error = issubclass(value, BaseException)
        kind = "exception" if is_error else "class"
        yield Api(name, kind, doc, base=value.__bases__[0].__name__ if value.__bases__ else None)
        return
    try:
        signature = inspect.signature(value)  # type: ignore[arg-type]
    except (ValueError, TypeError):
        yield Api(name, kind, doc)
        return
    shown = [p for p in signature.parameters.values() if p.name != "self"]
    empty = inspect.Parameter.empty
    parameters = [(p.name, None if p.default is empty else repr(p.default)) for p in shown]
    if any(default and default.startswith("<") for _, default in parameters):
        parameters = []
    text = str(signature.replace(parameters=shown)).replace(", /", "").split(" ->")[0]
    yield Api(name, kind, doc, None if "<" in text else text, parameters)
