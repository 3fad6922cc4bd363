"""What a characterisation runs: items of so many prompt and generated tokens, read from a file.

A file is TOML, or YAML with the extra `bench`. Its fields are those of `Workload` and `Item`, its
`[sampling]` some of `SamplingParams`; every other key is an error. The same fields, as a dict, are
what a `Record` keeps, so that a record can be resumed and replayed.
"""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, get_type_hints

from deskside.engine.sampler import SamplingParams
from deskside.errors import DesksideError

SAMPLING = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repeat_penalty",
    "repeat_last_n",
    "presence_penalty",
    "frequency_penalty",
)
STDLIB = "stdlib"
# A prompt that is scaled down still has a nonce and some text, an answer still has a gap.
MIN_PROMPT, MIN_GENERATE = 16, 2


@dataclass(frozen=True)
class Item:
    """One inference.

    prompt     tokens of new text
    generate   tokens to generate
    continues  the prompt is put behind the item before and its answer, which a cache may hold
    tree       the item stands for as many as it takes to read all of the text in order, each of
               `prompt` tokens
    """

    name: str
    prompt: int
    generate: int
    continues: bool = False
    tree: bool = False


@dataclass(frozen=True)
class Workload:
    """Checked once, here; DesksideError names the field.

    text        where prompts come from: "stdlib" (sources of the running Python) or a directory
    too_long    an item beyond the target's context is refused ("refuse") before anything runs, or
                left out and listed ("skip")
    repeats     times that the whole list is run
    warmup      runs of the first item that only warm up, marked as such; 0: none, what is warm-up
                is found from the data
    ignore_eos  generate exactly as many tokens as asked
    scale, max_prompt, max_tokens
                how the items were shrunk from the file's; nothing is shrunk twice
    """

    name: str
    items: tuple[Item, ...]
    description: str = ""
    text: str = STDLIB
    too_long: str = "refuse"
    repeats: int = 1
    warmup: int = 0
    ignore_eos: bool = True
    scale: float = 1.0
    max_prompt: int | None = None
    max_tokens: int | None = None
    sampling: SamplingParams = field(default_factory=SamplingParams)

    def __post_init__(self) -> None:
        if not self.name:
            raise DesksideError("name is empty")
        if not self.items:
            raise DesksideError("items is empty: a workload needs at least one")
        for where, value, min_value in (
            ("repeats", self.repeats, 1),
            ("warmup", self.warmup, 0),
            ("max_prompt", self.max_prompt, 1),
            ("max_tokens", self.max_tokens, 1),
        ):
            if value is not None and value < min_value:
                raise DesksideError(f"{where} is {value}; expected at least {min_value}")
        if not 0 < self.scale <= 1:
            raise DesksideError(f"scale is {self.scale}; expected more than 0 and at most 1")
        if self.too_long not in ("refuse", "skip"):
            raise DesksideError(f'too_long is {self.too_long!r}; expected "refuse" or "skip"')
        for i, item in enumerate(self.items):
            for where, value in (("prompt", item.prompt), ("generate", item.generate)):
                if value < 1:
                    raise DesksideError(f"items[{i}].{where} is {value}; expected at least 1")
            if not item.name:
                raise DesksideError(f"items[{i}].name is empty")
            if item.continues and (i == 0 or item.tree or self.items[i - 1].tree):
                raise DesksideError(
                    f"items[{i}].continues: there is no item that it could continue"
                )

    def depths(self) -> Iterator[tuple[Item, int]]:
        """Items, each with the tokens that its context holds at the end."""
        depth = 0
        for item in self.items:
            depth = (depth if item.continues else 0) + item.prompt + item.generate
            yield item, depth

    def shrunk(
        self,
        scale: float | None = None,
        max_prompt: int | None = None,
        max_tokens: int | None = None,
    ) -> Workload:
        """For a small machine: all tokens times `scale`, then new text and answers capped.

        Where items that are too long are left out, those beyond `max_prompt` are, too
        (`fit_context`); otherwise they are cut to it. A changed item's name tells its new size.
        """
        scale = 1.0 if scale is None else scale
        if not 0 < scale <= 1:
            raise DesksideError(f"--scale {scale}: expected more than 0 and at most 1")
        for flag, value in (("--max-prompt", max_prompt), ("--max-tokens", max_tokens)):
            if value is not None and value < 1:
                raise DesksideError(f"{flag} {value}: expected at least 1")

        def scaled(n: int, min_n: int, max_n: int | None) -> int:
            n = min(n, max(min_n, round(n * scale)))
            return n if max_n is None else min(n, max_n)

        cut = None if self.too_long == "skip" else max_prompt
        items = []
        for item in self.items:
            prompt = scaled(item.prompt, MIN_PROMPT, cut)
            generate = scaled(item.generate, MIN_GENERATE, max_tokens)
            changed = (prompt, generate) != (item.prompt, item.generate)
            name = f"{item.name} ({prompt}+{generate})" if changed else item.name
            items.append(dataclasses.replace(item, name=name, prompt=prompt, generate=generate))
        return dataclasses.replace(
            self,
            items=tuple(items),
            scale=self.scale * scale,
            max_prompt=_smaller(self.max_prompt, max_prompt),
            max_tokens=_smaller(self.max_tokens, max_tokens),
        )

    def within(self, n_ctx: int) -> Workload:
        """At the largest scale, in hundredths, with which no item needs more than `n_ctx` tokens of
        context; as it is where none does."""
        for hundredths in range(100, 0, -1):
            shrunk = self.shrunk(hundredths / 100)
            if max(depth for _, depth in shrunk.depths()) <= n_ctx:
                return shrunk
        return self

    def params(self, max_tokens: int, seed: int) -> SamplingParams:
        """How a run of this workload samples."""
        return dataclasses.replace(
            self.sampling, max_tokens=max_tokens, seed=seed, ignore_eos=self.ignore_eos
        )

    def to_dict(self) -> dict[str, Any]:
        """As JSON, for a record; `from_dict` reads it."""
        data = dataclasses.asdict(self)
        data["items"] = [dataclasses.asdict(item) for item in self.items]
        data["sampling"] = {name: getattr(self.sampling, name) for name in SAMPLING}
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], source: str) -> Workload:
        """DesksideError names `source` and the field that is unknown, missing or wrong."""
        values = dict(data)
        items, sampling = values.pop("items", None), values.pop("sampling", {})
        if not isinstance(items, list):
            raise DesksideError(f"{source}: items: expected a list of items ([[items]] in TOML)")
        read = [_fields(Item, item, f"{source}: items[{i}]") for i, item in enumerate(items)]
        values = _fields(cls, values, source, given=("items", "sampling"))
        try:
            params = SamplingParams(**_sampling(sampling))
            return cls(items=tuple(Item(**item) for item in read), sampling=params, **values)
        except DesksideError as failure:
            raise DesksideError(f"{source}: {failure}") from None

    @classmethod
    def read(cls, name: str) -> Workload:
        """A workload that comes with the package, by name, or a file of one."""
        path = Path(name)
        if name in shipped():
            path = Path(str(_FOLDER / f"{name}.toml"))
        elif path.suffix not in (".toml", ".yaml", ".yml"):
            known = ", ".join(shipped())
            raise DesksideError(
                f"--workload {name}: there is {known}, or name a .toml or .yaml file"
            )
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise DesksideError(f"{path}: is not UTF-8 text") from None
        data = _parse(text, path)
        if not isinstance(data, dict):
            raise DesksideError(f"{path}: expected the fields of a workload: name, items, …")
        workload = cls.from_dict(data, str(path))
        if workload.text != STDLIB:  # a directory is named from where the file is
            folder = str(path.parent / Path(workload.text).expanduser())
            workload = dataclasses.replace(workload, text=folder)
        return workload


_FOLDER = resources.files("deskside.bench") / "workloads"


def shipped() -> list[str]:
    """Names of the workloads that come with the package."""
    names = (entry.name for entry in _FOLDER.iterdir())
    return sorted(name.removesuffix(".toml") for name in names if name.endswith(".toml"))


def fit_context(
    workload: Workload, n_ctx: int | None, reason: str
) -> tuple[Workload, list[dict[str, str]]]:
    """The workload without what cannot run, and that, as {"name", "reason"}.

    n_ctx: tokens that a context may hold; None: unknown, then nothing is too long. reason: why no
    more, for people. DesksideError names the item that is too long where the workload says so.
    """
    kept, skipped, gone = [], [], False
    for item, depth in workload.depths():
        why = ""
        if workload.too_long == "skip" and item.prompt > (workload.max_prompt or item.prompt):
            why = f"is beyond --max-prompt {workload.max_prompt}"
        elif n_ctx is not None and depth > n_ctx:
            why = f"needs a context of {depth} tokens; {reason}"
        if why and workload.too_long == "refuse":
            fitting = workload.within(n_ctx) if n_ctx is not None else workload
            scale = "" if fitting == workload else f" {fitting.scale:g}"
            raise DesksideError(
                f"workload {workload.name}: item {item.name!r} {why}; "
                f"shrink the workload with --scale{scale} or --max-prompt"
            )
        gone = bool(why) or (gone and item.continues)
        if gone:
            skipped.append({"name": item.name, "reason": why or "continues a skipped item"})
        else:
            kept.append(item)
    if not kept:
        raise DesksideError(
            f"workload {workload.name}: no item can run; the shortest {skipped[0]['reason']}"
        )
    return dataclasses.replace(workload, items=tuple(kept)), skipped


def _parse(text: str, path: Path) -> Any:
    if path.suffix == ".toml":
        try:
            return tomllib.loads(text)
        except tomllib.TOMLDecodeError as failure:
            raise DesksideError(f"{path}: not TOML: {failure}") from None
    try:
        import yaml
    except ImportError:
        raise DesksideError(f"{path}: YAML needs: pip install 'deskside[bench]'") from None
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as failure:
        raise DesksideError(f"{path}: not YAML: {' '.join(str(failure).split())}") from None
    except RecursionError:
        raise DesksideError(f"{path}: not YAML: nested too deeply") from None


def _fields(kind: type, data: Any, where: str, given: tuple[str, ...] = ()) -> dict[str, Any]:
    """`data` with every value of its field's type; `given` are fields that come from elsewhere."""
    if not isinstance(data, Mapping):
        raise DesksideError(f"{where}: expected fields with values")
    hints = get_type_hints(kind)
    known = {f.name: f for f in dataclasses.fields(kind) if f.name not in given}
    found: dict[str, Any] = {}
    for name, value in data.items():
        if name not in known:
            raise DesksideError(f"{where}: unknown field {name!r}; there is {', '.join(known)}")
        types = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
        either = (hints[name], *getattr(hints[name], "__args__", ()))  # of "int | None"
        wanted = next(t for t in types if t in either)
        absent = value is None and known[name].default is None
        number = wanted is float and type(value) is int
        if not absent and not number and type(value) is not wanted:
            raise DesksideError(f"{where}: {name} is {value!r:.60}; expected {types[wanted]}")
        found[name] = float(value) if number else value
    for name, f in known.items():
        if name not in found and f.default is dataclasses.MISSING:
            raise DesksideError(f"{where}: field {name!r} is missing")
    return found


def _sampling(data: Any) -> dict[str, Any]:
    if not isinstance(data, Mapping):
        raise DesksideError("sampling: expected fields with values")
    unknown = [name for name in data if name not in SAMPLING]
    if unknown:
        raise DesksideError(
            f"sampling: unknown field {unknown[0]!r}; there is {', '.join(SAMPLING)}"
        )
    return dict(data)


def _smaller(a: int | None, b: int | None) -> int | None:
    return min((n for n in (a, b) if n is not None), default=None)
