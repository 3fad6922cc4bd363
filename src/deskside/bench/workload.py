"""Workloads: lists of items, each with a number of prompt tokens and of tokens to generate.

A workload file is TOML, or YAML with the extra `bench`. It has the fields of `Workload` and `Item`;
`[sampling]` has fields of `SamplingParams`. Any other key is an error. A `Record` keeps the same
fields as a dict, so that it can be resumed and replayed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct, field
from msgspec.structs import replace

from deskside import schema
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
# Tokens. A scaled-down prompt still has a nonce and some text; an answer still has one gap.
MIN_PROMPT, MIN_GENERATE = 16, 2

Count = Annotated[int, Meta(ge=1)]


class Item(Struct, frozen=True, forbid_unknown_fields=True):
    """One run.

    prompt     tokens of new text
    generate   tokens to generate
    continues  append the prompt to the previous item and its answer, which a cache may hold
    thinking   leading tokens of the answer that are thinking; prompts that continue it leave them
               out, as chat templates do
    tree       repeat the item, `prompt` tokens each, until all of the text was read in order
    representative   the report shows it among the few runs that stand for all
    """

    name: schema.Name
    prompt: Count
    generate: Count
    continues: bool = False
    thinking: Annotated[int, Meta(ge=0)] = 0
    tree: bool = False
    representative: bool = False


class Workload(Struct, frozen=True, forbid_unknown_fields=True):
    """A list of items and how to run it. `from_dict` checks it.

    text        source of the prompts: "stdlib" (sources of the running Python) or a directory
    too_long    for items longer than the target's context: "refuse" before any run, or "skip" and
                list them
    repeats     times to run the whole list
    warmup      extra runs of the first item that only warm up; with 0, the report finds the warm-up
                from the data
    ignore_eos  generate exactly `generate` tokens
    scale, max_prompt, max_tokens
                how the items were shrunk from those of the file; they are never shrunk twice
    """

    name: schema.Name
    items: Annotated[tuple[Item, ...], Meta(min_length=1)]
    description: str = ""
    text: str = STDLIB
    too_long: Literal["refuse", "skip"] = "refuse"
    repeats: Count = 1
    warmup: Annotated[int, Meta(ge=0)] = 0
    ignore_eos: bool = True
    scale: Annotated[float, Meta(gt=0, le=1, description="more than 0 and at most 1")] = 1.0
    max_prompt: Count | None = None
    max_tokens: Count | None = None
    sampling: SamplingParams = field(default_factory=SamplingParams)

    def __post_init__(self) -> None:
        for i, item in enumerate(self.items):
            if item.continues and (i == 0 or item.tree or self.items[i - 1].tree):
                raise DesksideError(f"items[{i}].continues: there is no item before it")
            if item.thinking > item.generate:
                raise DesksideError(
                    f"items[{i}].thinking is {item.thinking}; expected at most the "
                    f"{item.generate} tokens that it generates"
                )

    def depths(self) -> Iterator[tuple[Item, int]]:
        """Yield each item, and the tokens that its context holds at the end."""
        said = 0
        for item in self.items:
            depth = (said if item.continues else 0) + item.prompt + item.generate
            said = depth - item.thinking
            yield item, depth

    def shrunk(
        self,
        scale: float | None = None,
        max_prompt: int | None = None,
        max_tokens: int | None = None,
    ) -> Workload:
        """A smaller workload: all token counts times `scale`, then limited to the maxima.

        If `too_long` is "skip", `fit_context` skips items beyond `max_prompt`; otherwise prompts
        are cut to it. The name of a changed item contains its new size. DesksideError for a bad
        scale or maximum.
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
            thinking = min(generate, round(item.thinking * generate / item.generate))
            items.append(
                replace(item, name=name, prompt=prompt, generate=generate, thinking=thinking)
            )
        return replace(
            self,
            items=tuple(items),
            scale=self.scale * scale,
            max_prompt=_smaller(self.max_prompt, max_prompt),
            max_tokens=_smaller(self.max_tokens, max_tokens),
        )

    def within(self, n_ctx: int) -> Workload:
        """Scaled so that no item needs more than `n_ctx` tokens; unchanged if none does.

        Takes the largest such scale, in hundredths.
        """
        for hundredths in range(100, 0, -1):
            shrunk = self.shrunk(hundredths / 100)
            if max(depth for _, depth in shrunk.depths()) <= n_ctx:
                return shrunk
        return self

    def params(self, max_tokens: int, seed: int) -> SamplingParams:
        """The sampling parameters of a run."""
        return dataclasses.replace(
            self.sampling, max_tokens=max_tokens, seed=seed, ignore_eos=self.ignore_eos
        )

    def to_dict(self) -> dict[str, Any]:
        """The workload as JSON values, for a record. `from_dict` reads them."""
        data: dict[str, Any] = msgspec.to_builtins(self)
        data["items"] = list(data["items"])
        data["sampling"] = {name: getattr(self.sampling, name) for name in SAMPLING}
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], source: str) -> Workload:
        """Check and build a workload. DesksideError names `source` and the bad field."""
        sampling = data.get("sampling")
        for name in sampling if isinstance(sampling, Mapping) else ():
            if name not in SAMPLING:
                raise DesksideError(
                    f"{source}: sampling: unknown field {name!r:.60}; "
                    f"the fields are {', '.join(SAMPLING)}"
                )
        return schema.build(data, cls, source)

    @classmethod
    def read(cls, name: str) -> Workload:
        """Read a workload of the package, by its name, or a workload file."""
        path = Path(name)
        if name in shipped():
            path = Path(str(_FOLDER / f"{name}.toml"))
        elif path.suffix not in (".toml", ".yaml", ".yml"):
            known = ", ".join(shipped())
            raise DesksideError(
                f"--workload {name}: choose one of {known}, or name a .toml or .yaml file"
            )
        data = schema.parse(path)
        if not isinstance(data, dict):
            raise DesksideError(f"{path}: expected the fields of a workload: name, items, …")
        workload = cls.from_dict(data, str(path))
        if workload.text != STDLIB:  # a directory is relative to the file
            folder = str(path.parent / Path(workload.text).expanduser())
            workload = replace(workload, text=folder)
        return workload


_FOLDER = resources.files("deskside.bench") / "workloads"


def shipped() -> list[str]:
    """Names of the workloads of the package."""
    names = (entry.name for entry in _FOLDER.iterdir())
    return sorted(name.removesuffix(".toml") for name in names if name.endswith(".toml"))


def fit_context(
    workload: Workload, n_ctx: int | None, reason: str
) -> tuple[Workload, list[dict[str, str]]]:
    """Remove items that are too long. Returns the workload, and {"name", "reason"} of each.

    n_ctx: most tokens of a context; None = unknown, and no item is too long.
    reason: why the context is no longer, to show to the user.
    DesksideError if an item is too long and `too_long` is "refuse", or if no item is left.
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
    return replace(workload, items=tuple(kept)), skipped


def _smaller(a: int | None, b: int | None) -> int | None:
    return min((n for n in (a, b) if n is not None), default=None)
