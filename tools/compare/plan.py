"""The tests of a run, their targets, and the engines."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deskside.tape.cost import Work

ROOT = Path(__file__).resolve().parents[2]
CAPI = ROOT / "tests" / "oracles" / "capi.py"

OURS, LLAMA, IK = "deskside", "llama.cpp", "ik_llama.cpp"
PEERS = (LLAMA, IK)

IK_OPTIONS = "flash attention (off for several sequences, where it fails), fused MoE, graph reuse"
PROMPT = 16  # tokens before decode at depth 0 and in every sequence of a batch
WARM_STEPS = 8
UBATCH, LONG_UBATCH = 512, 2048


@dataclass(frozen=True)
class Test:
    """One figure: tokens per second of `kind` (prefill, decode or batch).

    tokens: length of the prompt, or number of steps.
    targets: by peer, the least ratio; under "limit", the least share of the machine's limit.
    """

    name: str
    kind: str
    context: str
    tokens: int
    targets: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Context:
    """A context for tests. A trial chooses the fastest of `ubatches`.

    depth: tokens in the context before the first round. Every round of decode continues the last.
    """

    name: str
    n_ctx: int
    kv: str = "f16"
    n_seq: int = 1
    ubatches: tuple[int, ...] = (UBATCH,)
    depth: int = 0


@dataclass(frozen=True)
class Stage:
    """Contexts that are open at the same time, and the tests that run interleaved on them."""

    contexts: tuple[Context, ...]
    tests: tuple[Test, ...]

    def context(self, test: Test) -> Context:
        return next(c for c in self.contexts if c.name == test.context)

    @property
    def n_ctx(self) -> int:
        """Tokens of the longest sequence."""
        return max(c.n_ctx // c.n_seq for c in self.contexts)


@dataclass(frozen=True)
class Engine:
    """A program under test.

    peer: the name of its ratio. If a peer has several engines, the fastest counts.
    copies: share of the file that it copies to its own memory; the rest is the mapped file.
    """

    name: str
    peer: str
    source: Path
    class_name: str
    options: dict[str, Any]
    copies: float
    said: str


ENGINES = (
    Engine(OURS, OURS, ROOT / "tools" / "compare" / "engine.py", "Deskside", {}, 1, "defaults"),
    Engine(
        LLAMA, LLAMA, CAPI, "LlamaCpp", {}, 1,
        "repacking, flash attention auto (on for q8_0 KV)",
    ),
    Engine(
        IK, IK, CAPI, "IkLlama", {}, 0,
        IK_OPTIONS,
    ),
    Engine(
        f"{IK} -rtr", IK, CAPI, "IkLlama", {"repack": True}, 1,
        f"{IK_OPTIONS}, run-time repacking",
    ),
)  # fmt: skip


def stages(*, quick: bool, rounds: int) -> tuple[Stage, ...]:
    """All tests. quick: leave out the long ones, and use depth 1024 instead of 4096."""
    depth = 1024 if quick else 4096
    few = {IK: 1.5, LLAMA: 2.0}
    many = {IK: 1.3, LLAMA: 2.0, "limit": 0.7}
    deep = {IK: 1.1, LLAMA: 1.35, "limit": 0.9}
    batch = {IK: 1.3, LLAMA: 1.5}

    short = Stage(
        (Context("short", 1024),),
        (
            Test("prefill 32", "prefill", "short", 32, few),
            Test("prefill 128", "prefill", "short", 128, few),
            Test("prefill 512", "prefill", "short", 512, many),
            Test("decode, depth 0", "decode", "short", 64, {IK: 1.05, LLAMA: 1.25, "limit": 0.93}),
        ),
    )
    long = Stage(
        (Context("long", 2048, ubatches=(UBATCH, LONG_UBATCH)),),
        (Test("prefill 2048", "prefill", "long", 2048, many),),
    )
    steps = 16 if quick else 32
    # deskside computes one more token per round: the last token of the round before.
    room = depth + WARM_STEPS + 2 + rounds * (steps + 1)
    deep_stage = Stage(
        tuple(Context(f"deep {kv}", room, kv, depth=depth) for kv in ("f16", "q8_0")),
        tuple(
            Test(f"decode, depth {depth}, {kv} KV", "decode", f"deep {kv}", steps, deep)
            for kv in ("f16", "q8_0")
        ),
    )
    counts = (4,) if quick else (4, 8)
    each = PROMPT + WARM_STEPS + rounds * 16
    batches = Stage(
        tuple(Context(f"batch {n}", n * each, n_seq=n) for n in counts),
        tuple(Test(f"decode, {n} sequences", "batch", f"batch {n}", 16, batch) for n in counts),
    )
    return (short, deep_stage, batches) if quick else (short, long, deep_stage, batches)


def within(all_stages: Iterable[Stage], n_ctx: int) -> tuple[list[Stage], list[str]]:
    """The stages that fit a context of n_ctx tokens, and the names of all other tests."""
    fitting = [s for s in all_stages if s.n_ctx <= n_ctx]
    return fitting, [t.name for s in all_stages if s.n_ctx > n_ctx for t in s.tests]


def amounts(work: Work, stage: Stage, test: Test, rounds: int) -> dict[str, float]:
    """Bytes and multiply-adds per token of a test, at the middle of all rounds."""
    context = stage.context(test)
    if test.kind == "prefill":
        return work.prefill(test.tokens)
    if context.depth or test.kind == "batch":
        depth = (context.depth or PROMPT) + WARM_STEPS + rounds * test.tokens // 2
    else:
        depth = PROMPT + test.tokens // 2
    return work.decode(depth, context.kv, context.n_seq)
