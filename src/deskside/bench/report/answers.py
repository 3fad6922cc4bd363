"""Whether answers show damage: loops, garbage, no text, an early end. Figures of `Run.answer`."""

from __future__ import annotations

from collections.abc import Callable

from deskside.bench.record import LOOP, Answer, Record, Run
from deskside.bench.report.facts import Side
from deskside.bench.report.part import is_random
from deskside.bench.report.tables import Table, percent

REPEATED = 0.5  # share of an answer's stretches that came before
LONG = 400  # characters from which that share means anything
ENDED = "stop"  # why a run ends that the model has ended
NAMED = 5

Check = Callable[[Run, Answer], bool]


def _early(record: Record) -> Check:
    forced = record.workload.get("ignore_eos", True) is not False

    def early(run: Run, answer: Answer) -> bool:
        return run.generated_tokens < answer.asked and (forced or run.stop_reason != ENDED)

    return early


def _checks(record: Record) -> list[tuple[str, str, Check]]:
    """Name, rule, and what it finds."""
    return [
        (
            "loop",
            f"the end repeats one piece 4 times or more over at least {LOOP} characters, or at "
            f"least {percent(REPEATED)} of the stretches of 40 characters came before (in answers "
            f"from {LONG} characters on)",
            lambda _, a: a.loop >= LOOP or (a.characters >= LONG and a.repeated >= REPEATED),
        ),
        (
            "garbage",
            "replacement characters (bytes that are no UTF-8) or control characters",
            lambda _, a: a.garbage > 0,
        ),
        ("no text", "nothing but white space", lambda _, a: a.printed == 0),
        (
            "early end",
            "fewer tokens than asked for, and the model did not choose to end",
            _early(record),
        ),
    ]


def said(record: Record, side: Side) -> str:
    """One sentence: how many answers were looked at, and what was found; "" of no runs."""
    runs = _runs(side)
    target = record.targets.get(side.name)
    if target is not None and is_random(target):
        return "Answers: not judged. The weights are random, so that no answer can show damage."
    looked = [run for run in runs if run.answer is not None]
    if not looked:
        return "Answers: not looked at; the record was made before they were." if runs else ""
    found = table(record, side).rows
    checks = [check for _, _, check in _checks(record)]
    damaged = sum(
        run.answer is not None and any(check(run, run.answer) for check in checks) for run in looked
    )
    counts = ", ".join(f"{row[0]} {row[2]}" for row in found)
    verdict = "no damage found" if not damaged else f"{damaged} damaged"
    return f"Answers: {len(looked)} of {len(runs)} looked at, {verdict} ({counts})."


def table(record: Record, side: Side) -> Table:
    """Empty where nothing can be judged."""
    target = record.targets.get(side.name)
    looked = [run for run in _runs(side) if run.answer is not None]
    if not looked or (target is not None and is_random(target)):
        return Table("", [], [])
    rows = []
    for name, rule, check in _checks(record):
        hits = [run.index for run in looked if run.answer and check(run, run.answer)]
        named = ", ".join(map(str, hits[:NAMED])) + (", …" if len(hits) > NAMED else "")
        rows.append([name, rule, str(len(hits)), named])
    note = f"Of {len(looked)} answers. What an answer says is not judged."
    if record.workload.get("ignore_eos", True) is not False:
        note += " Answers had to have their full length, past where the model would have ended."
    return Table("Answers", ["check", "rule", "answers", "runs"], rows, text=2, note=note)


def _runs(side: Side) -> list[Run]:
    """That generated something to look at."""
    return [row.run for row in side.rows if row.run.ok and row.phase != "extra"]
