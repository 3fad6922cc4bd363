"""The tests of a run, the targets they are held to, and which engines take part."""

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

    tokens: of the prompt, or steps. targets: least ratio by peer, and least share of the limit
    under "limit".
    """

    name: str
    kind: str
    context: str
    tokens: int
    targets: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Context:
    """State that tests run on. The first of `ubatches` that wins a trial is taken.

    depth: tokens that are there before the first round; decode goes on from where it was left.
    """

    name: str
    n_ctx: int
    kv: str = "f16"
    n_seq: int = 1
    ubatches: tuple[int, ...] = (UBATCH,)
    depth: int = 0


@dataclass(frozen=True)
class Stage:
    """Contexts that are open at the same time, and the tests that are interleaved on them."""

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
    """A program under test. `peer` is the name that its ratio goes by: of several engines of one
    peer the faster counts.

    copies: how much of the file it holds in memory of its own; the rest is the mapped file.
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
    """All tests; quick leaves out the long ones and takes depth 1024 for 4096."""
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
    # deskside computes one more token a round: the one that the last round ended with
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
    """The stages that a model's context holds, and the names of the tests of the others."""
    fitting = [s for s in all_stages if s.n_ctx <= n_ctx]
    return fitting, [t.name for s in all_stages if s.n_ctx > n_ctx for t in s.tests]


def amounts(work: Work, stage: Stage, test: Test, rounds: int) -> dict[str, float]:
    """Bytes and MACs that a token of the test takes, at the middle of all rounds."""
    context = stage.context(test)
    if test.kind == "prefill":
        return work.prefill(test.tokens)
    if context.depth or test.kind == "batch":
        depth = (context.depth or PROMPT) + WARM_STEPS + rounds * test.tokens // 2
    else:
        depth = PROMPT + test.tokens // 2
    return work.decode(depth, context.kv, context.n_seq)
