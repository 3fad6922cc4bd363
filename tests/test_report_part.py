"""A report on a slice: what it is of the model, no verdict, what is computed for the whole."""

from __future__ import annotations

from pathlib import Path

import pytest

from deskside.bench.predict import slices
from deskside.bench.predict.slices import Slice, full
from deskside.bench.record import ModelFile, OpProfile, Part, Record
from deskside.bench.report import html, markdown, representative, tables
from deskside.bench.report.analysis import summarise
from deskside.bench.report.part import whole
from deskside.bench.report.view import view
from deskside.bench.workload import Workload
from deskside.convert.synth import outline
from tests.records import BANDWIDTH, COMPUTE, make_record

EIGHT = Part("qwen3.5-35b-a3b", 8)
REPORTS = Path(__file__).parents[1] / "docs" / "reports"


def record_of(part: Part = EIGHT) -> Record:
    record = make_record()
    target = record.targets["A"]
    slice_ = Slice(part.preset, part.layers, part.experts)
    target.name = f"{part.preset} with random weights"
    target.part, target.random = part, True
    target.files = [ModelFile("x.gguf", slice_.nbytes)]
    for run in record.runs:
        work = slice_.work.decode(round(run.depth + run.generated_tokens / 2), "f16")
        prefill = slice_.work.prefill(run.prompt_tokens, 512)
        run.ceiling.decode_rate = BANDWIDTH / work["bytes"]
        run.ceiling.prefill_rate = min(BANDWIDTH / prefill["bytes"], COMPUTE / prefill["macs"])
        run.decode_seconds = (run.generated_tokens - 1) / (0.8 * run.ceiling.decode_rate)
        run.prefill_seconds = run.prompt_tokens / (0.4 * run.ceiling.prefill_rate)
    return record


def test_the_title_says_how_much_there_is_and_nothing_is_judged() -> None:
    seen = view(record_of(), "r.json")
    assert ", 8 of 40 layers, workload" in seen.title
    (page,) = seen.sides
    assert page.criteria == [] and page.outcome == "not measured"
    assert page.headline.startswith("No daily-use verdict: 8 of 40 layers")
    for text in (markdown.render(seen), html.render(seen)):
        assert "8 of 40 layers" in text and "Daily use" not in text
        assert "48 % of the bytes that a token reads in this slice are the head" in " ".join(
            text.split()
        )
    fewer = view(record_of(Part("qwen3.5-397b-a17b", 4, 320)), "r.json")
    assert "4 of 60 layers, 320 of 512 experts" in fewer.title


def test_the_whole_models_rates_keep_the_share_of_the_ceiling() -> None:
    """The slice reaches 80 and 40 %; so does what is computed for the model."""
    record = record_of()
    side = summarise(record).sides["A"]
    found = whole(record.targets["A"], side)
    assert (
        found is not None
        and found.layers == 40
        and found.head_share == pytest.approx(0.477, abs=0.001)
    )
    model, shallow, deep = full("qwen3.5-35b-a3b").work, 500, 17_000
    low, high = (0.8 * BANDWIDTH / model.decode(d, "f16")["bytes"] for d in (deep, shallow))
    assert found.tg is not None and low < found.tg < high
    # never by the number of layers: that would be 5 times slower
    slice_rate = side.samples["tg", "steady"]
    assert slice_rate is not None and 2.8 < slice_rate.median / found.tg < 3.4
    assert found.pp == pytest.approx(0.4 * COMPUTE / model.macs, rel=0.02)


def test_a_file_of_another_size_is_not_computed() -> None:
    record = record_of()
    record.targets["A"].files = [ModelFile("x.gguf", 10**9)]
    assert whole(record.targets["A"], summarise(record).sides["A"]) is None
    assert "8 of 40 layers" in view(record, "r.json").title


def test_a_slice_is_known_by_its_header_and_by_its_name() -> None:
    for layers, experts in ((8, None), (4, 128)):
        part = Part("qwen3.5-35b-a3b", layers, experts)
        file = outline(part.preset, **Slice(*_fields(part)).shape).gguf()
        assert slices.is_random(file) and slices.part(file) == part
        assert slices.named(Slice(*_fields(part)).name) == part
    assert slices.part(outline("qwen3.5-35b-a3b").gguf()) is None
    for name in ("qwen3.5-35b-a3b-40l", "qwen3.5-35b-a3b", "gpt-8l", "model"):
        assert slices.named(name) is None


def _fields(part: Part) -> tuple[str, int, int | None]:
    return part.preset, part.layers, part.experts


def test_an_old_record_of_a_slice_says_so() -> None:
    seen = view(Record.load(REPORTS / "35b-8l-vs-llama.json"), "r.json")
    assert "8 of 40 layers" in seen.title and all(not page.criteria for page in seen.sides)
    assert all("not judged" in " ".join(page.claims) for page in seen.sides)


# profiles


def test_a_share_above_all_is_explained() -> None:
    record = make_record()
    record.profile = [
        OpProfile("cached", "decode", seconds=1e-6, nbytes=2e-6 * BANDWIDTH, macs=0),
        OpProfile("slow", "decode", seconds=1e-3, nbytes=1e-4 * BANDWIDTH, macs=0),
    ]
    table = tables.profile(record)
    assert [row[-1] for row in table.rows] == ["200 % (a)", "10 %"]
    assert "caches" in table.note and "(b)" not in table.note
    record.profile = [OpProfile("x", "prefill", seconds=1e-6, nbytes=1, macs=1.5e-6 * COMPUTE)]
    table = tables.profile(record)
    assert table.rows[0][-1] == "150 % (b)" and "arithmetic" in table.note
    record.profile = record.profile[:0]
    assert tables.profile(record).note == ""


# representative runs


def test_representative_runs_are_those_that_the_workload_marks() -> None:
    items = Workload.read("article").items
    record = make_record(prompts=[i.prompt for i in items], shuffle=False)
    record.workload = Workload.read("article").to_dict()
    for run, item in zip(record.runs, items, strict=True):
        run.name, run.generated_tokens = item.name, item.generate
    side = summarise(record).sides["A"]
    table = representative.representative(record, side)
    assert table.header == ["#", "PP tokens", "TG tokens", "PP tok/s", "TG tok/s", "Total s"]
    assert [row[1:3] for row in table.rows] == [
        ["4,699", "13"],
        ["1,125", "2,048"],
        ["1,124", "2,048"],
        ["15,866", "2,048"],
        ["550", "520"],
    ]
    assert [int(row[0]) for row in table.rows] == [
        next(r.index for r in record.runs if r.name == f"published {n}") for n in range(1, 6)
    ]
    published = representative.published(record)
    assert published.rows[0][3:] == ["314.22", "21.95", "15.5"]
    assert "not measured here" in published.note
    record.workload = Workload.read("article").shrunk(0.5).to_dict()
    assert representative.published(record).rows == []


def test_elsewhere_they_are_spread_over_the_lengths() -> None:
    record = make_record()
    side = summarise(record).sides["A"]
    table = representative.representative(record, side)
    prompts = sorted(row.run.prompt_tokens for row in side.basis)
    assert [row[1] for row in table.rows] == [f"{prompts[i]:,}" for i in (0, 6, 13, 20, 26)]
    few = make_record(prompts=(500, 700, 900))
    assert len(representative.representative(few, summarise(few).sides["A"]).rows) == 2


def test_both_clocks_are_of_steady_runs() -> None:
    record = make_record()  # the cold run is half as fast
    side = summarise(record).sides["A"]
    for row, key in zip(representative.steady(side).rows, ("pp", "tg"), strict=True):
        rates = [r for x in side.of("steady") if (r := getattr(x, key)) is not None]
        assert row[1:] == [
            str(len(rates)),
            *(tables.number(x) for x in (max(rates), min(rates), sum(rates) / len(rates))),
        ]
        assert len(rates) == 27
