"""deskside bench on llama.cpp's real server, with the bundled model."""

from __future__ import annotations

from pathlib import Path

import pytest

from deskside.bench.measure.endpoint import LlamaServer, OpenAIServer, connect
from deskside.bench.measure.loop import characterise
from deskside.bench.measure.targets import InProcess
from deskside.bench.workload import Item, Workload
from deskside.engine.config import demo_model
from deskside.machine import rates
from deskside.server.client import Wire

from . import need
from .remote import Remote

WORKLOAD = Workload(
    "w",
    (
        Item("one", 200, 12),
        Item("talk", 60, 10),
        Item("talk on", 30, 10, continues=True),
        Item("two", 400, 8),
    ),
)


@pytest.fixture(autouse=True)
def quick_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rates, "bandwidth", lambda threads: 1e9)
    monkeypatch.setattr(rates, "compute", lambda threads, isa="": 1e12)


def test_both_apis_of_llama_server(tmp_path: Path) -> None:
    need.packages("xllamacpp")
    source = Path(__file__).with_name("llama_server.py")
    with Remote(source, "LlamaServer", str(demo_model()), 1024) as server:
        url = server.url()
        ours = InProcess(demo_model(), sha=False, ctx=1024, threads=1)
        theirs = connect(url, sha=False)
        assert isinstance(theirs, LlamaServer) and theirs.n_ctx == 1024 and theirs.roof()
        text = "def f(x):\n    return x  # <|im_end|> ünïcode"
        assert theirs.encode(text, True) == ours.encode(text, True)
        record = characterise(WORKLOAD, {"A": ours, "B": theirs}, tmp_path / "r.json")
        for run in record.runs:
            assert run.error is None and run.stop_reason == "length"
        for a, b in zip(*([r for r in record.runs if r.side == s] for s in "AB"), strict=True):
            assert b.clock == "server" and b.depth == (100 if b.name == "talk on" else a.depth)
            assert b.generated_tokens == a.generated_tokens == len(b.gaps) + 1
            assert b.prefill_seconds and b.first_seconds and b.decode_seconds and b.total_seconds
            assert b.prefill_seconds <= b.first_seconds <= b.total_seconds
            # its clock and ours, over a socket of the same machine
            assert b.decode_seconds == pytest.approx(sum(b.gaps), rel=0.5, abs=0.05)
        on = next(r for r in record.runs if (r.side, r.name) == ("B", "talk on"))
        assert on.cached_tokens > 0 and on.depth == 60 + 10 + 30

        openai = OpenAIServer(Wire(url), "demo", 1024)
        for run in characterise(WORKLOAD, {"A": openai}, tmp_path / "o.json").runs:
            assert run.error is None and run.clock == "server"  # it sends timings here, too
        theirs.close()
        openai.close()
