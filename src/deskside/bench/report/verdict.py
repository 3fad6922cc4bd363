"""Judges whether a model is fast enough for daily use. A TOML file can change the criteria.

A criterion passes, fails, or is not measured. If its size was not measured, its value is
interpolated, or extrapolated up to twice the measured range, and the report says so. Beyond that it
counts as not measured.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, get_type_hints

from msgspec import Meta, Struct

from deskside import schema
from deskside.bench.record import Record
from deskside.bench.report.analysis import known
from deskside.bench.report.facts import Length, Side, Summary
from deskside.bench.report.stats import FEWEST
from deskside.machine.watch import Host

PASSED, FAILED, UNMEASURED = "passed", "failed", "not measured"
ESSENTIAL = ("decode", "chat")  # without these there is no overall verdict
BEYOND = 2.0  # times the largest or smallest measured size
DAY = 86_400


def _because(reason: str) -> Meta:
    return Meta(
        gt=0, le=sys.float_info.max, description="a number above 0", extra={"reason": reason}
    )


class Criteria(Struct, frozen=True, forbid_unknown_fields=True):
    """Limits of the criteria. A criteria file has these names as keys. `REASONS` justifies each.

    Times are seconds, memory is bytes, changes and variations are fractions.
    """

    reading_words_per_minute: Annotated[
        float,
        _because("silent reading of English non-fiction (Brysbaert 2019, a review of 190 studies)"),
    ] = 238
    tokens_per_word: Annotated[
        float, _because("of English text in large BPE vocabularies, as their makers state")
    ] = 1.33
    reading_margin: Annotated[
        float,
        _because("eyes skip and jump back; text must not lag behind a reader who is a bit faster"),
    ] = 1.2
    chat_prompt: Annotated[float, _because("a question with a page of text or code")] = 1000
    chat_first_token: Annotated[
        float, _because("beyond two seconds a pause in a conversation is felt as one (Miller 1968)")
    ] = 2.0
    ingest_prompt: Annotated[float, _because("a long document or several source files")] = 16_000
    ingest_first_token: Annotated[
        float, _because("a document is given once; a minute is a short break")
    ] = 60
    agent_prompt: Annotated[float, _because("the result of a tool: a file, a test log")] = 1000
    agent_answer: Annotated[float, _because("a call with its reasoning, or a small edit")] = 250
    agent_depth: Annotated[
        float, _because("a conversation under way; what came before is cached")
    ] = 8000
    agent_turn: Annotated[
        float, _because("twenty turns, an ordinary task, take no more than 20 minutes")
    ] = 60
    max_variation: Annotated[float, _because("two standard deviations stay within a tenth")] = 0.05
    max_depth_change: Annotated[
        float, _because("a choice: nobody works differently at 9 tok/s than at 10")
    ] = 0.10
    min_free_memory: Annotated[float, _because("an editor and a browser beside the model")] = 4e9
    batch_tokens_per_day: Annotated[
        float, _because("a summary of 400 tokens for each of 500 documents, overnight")
    ] = 200_000

    @classmethod
    def load(cls, path: Path) -> Criteria:
        """Read a criteria file over the defaults. DesksideError names the file and the field."""
        return schema.build(schema.parse(path, ".toml"), cls, str(path))


REASONS: dict[str, str] = {
    name: limit.__metadata__[0].extra["reason"]
    for name, limit in get_type_hints(Criteria, include_extras=True).items()
}
DEFAULTS = Criteria()


@dataclass(frozen=True)
class Criterion:
    """A judged criterion. `value` and `limit` are in `unit`.

    note: where the value comes from, or why there is none.
    """

    side: str
    key: str
    name: str
    outcome: str
    value: float | None
    limit: float
    unit: str
    at_least: bool  # whether `limit` is a minimum
    note: str = ""


@dataclass(frozen=True)
class Found:
    """A value, None where there is none, and where it is from."""

    value: float | None
    note: str


def judge(record: Record, summary: Summary, criteria: Criteria = DEFAULTS) -> list[Criterion]:
    return [c for side in summary.sides.values() for c in _judge(side, record.machine, criteria)]


def overall(criteria: Sequence[Criterion]) -> str:
    """The overall verdict on one side.

    Failed if any criterion failed. Passed only if decode and chat were measured.
    """
    outcomes = {c.key: c.outcome for c in criteria}
    if FAILED in outcomes.values():
        return FAILED
    essential = all(outcomes.get(key) == PASSED for key in ESSENTIAL)
    return PASSED if essential else UNMEASURED


def _judge(side: Side, machine: Host, c: Criteria) -> list[Criterion]:
    def judged(
        key: str, name: str, found: Found, limit: float, unit: str, *, at_least: bool = False
    ) -> Criterion:
        outcome = UNMEASURED
        if found.value is not None:
            good = found.value >= limit if at_least else found.value <= limit
            outcome = PASSED if good else FAILED
        return Criterion(
            side.name, key, name, outcome, found.value, limit, unit, at_least, found.note
        )

    reading = c.reading_words_per_minute / 60 * c.tokens_per_word * c.reading_margin
    return [
        judged(
            "decode", "Decode keeps up with reading", _decode(side), reading, "tok/s", at_least=True
        ),
        judged(
            "chat",
            f"First token of a chat, {c.chat_prompt:,.0f} tokens",
            _first_token(side, c.chat_prompt),
            c.chat_first_token,
            "s",
        ),
        judged(
            "ingest",
            f"First token after {c.ingest_prompt:,.0f} tokens",
            _first_token(side, c.ingest_prompt),
            c.ingest_first_token,
            "s",
        ),
        judged("agent", "Turn of an agent", _agent(side, c), c.agent_turn, "s"),
        judged("variation", "Stable over runs", _variation(side), c.max_variation, "share"),
        _depth_criterion(side, c),
        judged(
            "memory",
            "Memory left free",
            _memory(side, machine),
            c.min_free_memory,
            "bytes",
            at_least=True,
        ),
        judged(
            "batch",
            "Tokens a day in batch",
            _batch(side),
            c.batch_tokens_per_day,
            "tokens",
            at_least=True,
        ),
    ]


def _decode(side: Side) -> Found:
    sample = side.samples["tg", "steady"] or side.samples["tg", "all"]
    if sample is None:
        return Found(None, "no run generated two tokens")
    if sample.n == 1:
        return Found(sample.median, "the only run")
    return Found(sample.p5, f"5th percentile of {sample.n} runs; median {sample.median:.1f}")


def _first_token(side: Side, tokens: float) -> Found:
    return at(side.lengths, tokens, lambda length: length.ttft, "first token")


def at(
    lengths: Sequence[Length], tokens: float, get: Callable[[Length], float | None], what: str
) -> Found:
    """Estimate the time for a prompt of `tokens` tokens.

    It is linear between measured lengths, and proportional to the tokens beyond them. The latter is
    too low where attention takes much of the time.
    """
    points = [(x.tokens, y) for x in lengths if (y := get(x)) is not None]
    if not points:
        return Found(None, f"no run without a cache has a time for its {what}")
    for x, y in points:
        if abs(x - tokens) <= 0.05 * tokens:
            return Found(y, f"measured at {x:,.0f} tokens")
    below = [p for p in points if p[0] < tokens]
    above = [p for p in points if p[0] > tokens]
    if below and above:
        (x0, y0), (x1, y1) = below[-1], above[0]
        value = y0 + (y1 - y0) * (tokens - x0) / (x1 - x0)
        return Found(value, f"interpolated between {x0:,.0f} and {x1:,.0f} tokens")
    x, y = (below or above[:1])[-1]
    if not x / BEYOND <= tokens <= x * BEYOND:
        return Found(None, f"nearest measured: {y:.3g} s at {x:,.0f} tokens")
    return Found(y * tokens / x, f"extrapolated from {x:,.0f} tokens")


def _agent(side: Side, c: Criteria) -> Found:
    turns = [row for row in side.basis if row.run.cached_tokens > 0 and row.total is not None]
    if turns:
        total = statistics.median(known(row.total for row in turns))
        new = statistics.median(row.run.prompt_tokens for row in turns)
        out = statistics.median(row.run.generated_tokens for row in turns)
        return Found(
            total,
            f"median of {len(turns)} turns with a cache: {new:,.0f} new tokens, "
            f"{out:,.0f} generated",
        )
    first = _first_token(side, c.agent_prompt)
    if side.depth is None or first.value is None:
        return Found(None, "no run took tokens from a cache, and decode was not measured at depths")
    if not side.depth.shallow / BEYOND <= c.agent_depth <= side.depth.deep * BEYOND:
        return Found(None, f"decode was measured up to a depth of {side.depth.deep:,.0f} only")
    rate = side.depth.rate(c.agent_depth)
    if rate is None:
        return Found(None, "decode has no trend that reaches this depth")
    return Found(
        first.value + (c.agent_answer - 1) / rate,
        f"computed: {c.agent_prompt:,.0f} new tokens at the prefill speed of a fresh prompt, "
        f"{c.agent_answer:,.0f} generated at a depth of {c.agent_depth:,.0f}, the rest cached",
    )


def _variation(side: Side) -> Found:
    n = len([row for row in side.basis if row.tg is not None])
    if side.variation is None or n < FEWEST:
        return Found(None, f"{n} runs decode; at least {FEWEST} are needed")
    return Found(side.variation, f"coefficient of variation about the trend over depth, {n} runs")


def _depth_criterion(side: Side, c: Criteria) -> Criterion:
    """Judge the change over depth, by its interval (`facts.Depth.stable`)."""
    outcome, value, note = UNMEASURED, None, "decode was measured at one depth only"
    if side.depth is not None:
        d = side.depth
        value = None if d.change is None else abs(d.change)
        outcome = {True: PASSED, False: FAILED, None: UNMEASURED}[d.stable(c.max_depth_change)]
        interval = d.change_interval
        note = f"from {d.shallow:,.0f} to {d.deep:,.0f} tokens: "
        if interval is None or d.change is None:
            note += f"too few runs for an interval; at least {FEWEST} are needed"
        else:
            note += f"{d.change:+.1%} ({interval.low:+.1%} to {interval.high:+.1%})"
            note += "; too wide to tell" if outcome == UNMEASURED else ""
    return Criterion(
        side.name,
        "depth",
        "Stable with context",
        outcome,
        value,
        c.max_depth_change,
        "share",
        False,
        note.replace("%", " %"),
    )


def _memory(side: Side, machine: Host) -> Found:
    if side.free_memory is None:
        return Found(None, "free memory was not recorded")
    total = f" of {machine.memory / 1e9:.1f} GB" if machine.memory > 0 else ""
    return Found(float(side.free_memory), f"least during the runs{total}")


def _batch(side: Side) -> Found:
    done = [(row.run.generated_tokens, row.total) for row in side.basis if row.total]
    seconds = sum(total for _, total in done if total)
    tokens = sum(max(n, 0) for n, _ in done)
    if not seconds or not tokens:
        return Found(None, "no run has a total time")
    return Found(
        tokens * DAY / seconds,
        "generated, one sequence at a time, with the measured mix of prompts and answers",
    )
