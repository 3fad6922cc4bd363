"""Endpoints over HTTP: both APIs, their clocks, and servers that do not behave."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from deskside.bench.measure.arrivals import Arrivals, timed
from deskside.bench.measure.endpoint import LlamaServer, OpenAIServer, connect, is_local
from deskside.bench.measure.loop import characterise
from deskside.bench.measure.targets import InProcess
from deskside.bench.record import Record, Run
from deskside.bench.workload import Item, Workload
from deskside.errors import DesksideError
from deskside.machine import rates
from tests.bench_servers import BAD_JSON, N_CTX, Handler, Server, serving
from tests.commands import inside, refused
from tests.models import tiny

WORKLOAD = Workload(
    "w",
    (
        Item("one", 40, 6),
        Item("talk", 30, 5),
        Item("talk on", 20, 5, continues=True),
        Item("two", 90, 4),
    ),
)


def bench(server: Server, out: Path, **options: Any) -> Record:
    target = connect(server.url, seconds=options.pop("seconds", 5))
    try:
        return characterise(options.pop("workload", WORKLOAD), {"A": target}, out, **options)
    finally:
        target.close()


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "r.json"


@pytest.fixture
def llama() -> Iterator[Server]:
    with serving("llama") as server:
        yield server


@pytest.fixture
def openai() -> Iterator[Server]:
    with serving("openai") as server:
        yield server


# servers that behave


def test_llama_server_is_asked_in_its_own_way(llama: Server, out: Path) -> None:
    record = bench(llama, out, seed=70)
    target = record.targets["A"]
    assert [body["seed"] for body in llama.requests] == [70, 71, 72, 73]
    assert (target.kind, target.name, target.n_ctx) == ("endpoint", "fake.gguf", N_CTX)
    assert target.engine == "llama-server b1-fake" and target.url == llama.url
    for run, item, body in zip(record.runs, WORKLOAD.items, llama.requests, strict=True):
        assert run.ok and run.clock == "server" and run.generated_tokens == item.generate
        assert len(run.gaps) == item.generate - 1 and run.stop_reason == "length"
        assert run.decode_seconds == pytest.approx(0.01 * (item.generate - 1))
        assert run.prefill_seconds == pytest.approx(0.002 * run.prompt_tokens)
        assert run.prefill_rate == pytest.approx(500)
        assert body["n_predict"] == item.generate and body["ignore_eos"] is True
        assert body["cache_prompt"] is item.continues
        assert all(type(t) is int for t in body["prompt"])
        assert not run.cold and run.load.other_cpu is None and run.load.available_memory
    one, talk, on, _ = record.runs
    assert (one.prompt_tokens, one.cached_tokens) == (40, 0)
    # the conversation's tokens came back as they were: all but the answer's last one is cached
    assert (on.prompt_tokens, on.cached_tokens) == (21, talk.depth + 4)
    assert llama.requests[2]["prompt"][:30] == llama.requests[1]["prompt"]


@pytest.mark.parametrize("options", [{}, {"strict": True}, {"chat_only": True}])
def test_openai_servers_are_asked_in_theirs(out: Path, options: dict[str, bool]) -> None:
    with serving("openai", **options) as server:
        record = bench(server, out)
        asked = [body for body in server.requests if body.get("stream")]
    for run, item in zip(record.runs, WORKLOAD.items, strict=True):
        assert run.ok and run.clock == "stream" and run.prefill_seconds is None
        assert run.generated_tokens == item.generate and len(run.gaps) == item.generate - 1
        assert sum(run.gaps) == pytest.approx(run.decode_seconds, abs=1e-6 * len(run.gaps))
        assert run.first_seconds is not None and run.first_seconds > 0
        assert run.stop_reason == "length"
    # calibrated: what the server counts is what was asked, nearly
    assert record.runs[3].prompt_tokens == pytest.approx(90, abs=3)
    assert record.runs[2].prompt_tokens == pytest.approx(30 + 20 + 1, abs=5)
    chat = "chat_only" in options
    api = "/v1/chat/completions" if chat else "/v1/completions"
    assert record.targets["A"].options == {"api": api, "extensions": "strict" not in options}
    assert ("ignore_eos" in asked[0]) is ("strict" not in options)
    assert asked[0]["model"] == "fake" and ("messages" in asked[0]) is chat


def test_a_cache_that_cannot_be_switched_off_gets_new_prompts_every_time(
    openai: Server, llama: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moments = iter(f"2026-01-01T00:00:{i:02}" for i in range(60))
    monkeypatch.setattr("deskside.bench.measure.loop._now", lambda: next(moments))
    for server in (openai, llama):
        for i in range(2):
            bench(server, tmp_path / f"{i}.json", workload=Workload("w", (Item("a", 60, 2),)))
    first, second = (body["prompt"] for body in openai.requests if body.get("stream"))
    assert first[:8] != second[:8]
    first, second = (body["prompt"] for body in llama.requests)
    assert first == second


def test_sides_in_turns(llama: Server, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rates, "bandwidth", lambda threads: 1e9)
    monkeypatch.setattr(rates, "compute", lambda threads, isa="": 1e12)
    ours = InProcess(tiny(), sha=False, ctx=200, threads=1)
    theirs = connect(llama.url)
    record = characterise(WORKLOAD, {"A": ours, "B": theirs}, out)
    assert [r.side for r in record.runs] == list("ABBAABBA")
    assert [r.clock for r in record.runs if r.side == "B"] == ["server"] * 4
    assert [r.index for r in record.runs] == [0, 0, 1, 1, 2, 2, 3, 3]
    ceilings = {r.side: r.ceiling.decode_rate for r in record.runs}
    assert ceilings["A"] is not None and ceilings["B"] is None
    theirs.close()


# servers that do not


def first_error(record: Record) -> str:
    assert record.runs[0].error is not None
    return record.runs[0].error


def on_token(n: int, act: Callable[[Handler], None]) -> Callable[[Handler, int], bool]:
    def misbehave(handler: Handler, i: int) -> bool:
        if i == n:
            act(handler)
        return i == n

    return misbehave


def raw(data: bytes) -> Callable[[Handler], None]:
    def act(handler: Handler) -> None:
        handler.wfile.write(data)
        handler.wfile.flush()

    return act


@pytest.mark.parametrize("api", ["llama", "openai"])
@pytest.mark.parametrize(
    ("act", "part"),
    [
        (raw(BAD_JSON), "streams garbage: {not json}"),
        (raw(b"\xff\xfe\x00 what?\n\n"), "streams garbage"),
        (raw(b"data: [1, 2]\n\n"), "streams garbage"),
        (raw(b'data: {"error": {"message": "out of memory", "code": 500}}\n\n'), "out of memory"),
        (raw(b'error: {"message": "slot lost"}\n\n'), "slot lost"),
        (raw(b"data: " + b"[" * 100_000 + b"\n\n"), "streams garbage"),
    ],
)
def test_garbage_is_told_and_what_was_measured_stays(
    api: str, act: Callable[[Handler], None], part: str, out: Path
) -> None:
    with serving(api) as server:
        # of the second item alone: the third continues it
        broken = on_token(2, act)
        server.misbehave = lambda h, i: len(streams(server)) == 2 and broken(h, i)
        record = bench(server, out)
    assert [r.ok for r in record.runs] == [True, False, False, True]
    assert part in str(record.runs[1].error) and "\n" not in str(record.runs[1].error)
    assert "which it continues, failed" in str(record.runs[2].error)
    assert Record.load(out) == record


def streams(server: Server) -> list[dict[str, Any]]:
    return [body for body in server.requests if body.get("stream")]


@pytest.mark.parametrize(
    ("api", "part"), [("llama", "before its last event"), ("openai", "without a token")]
)
def test_a_stream_that_ends_early(api: str, part: str, out: Path) -> None:
    with serving(api) as server:
        server.misbehave = lambda handler, i: len(streams(server)) == 1
        assert part in first_error(bench(server, out))


def test_a_connection_that_breaks(llama: Server, out: Path) -> None:
    def cut(handler: Handler) -> None:
        handler.wfile.write(b"data: {")
        handler.wfile.flush()

    llama.misbehave = on_token(3, cut)
    with pytest.raises(DesksideError, match="3 runs in a row failed"):
        bench(llama, out)
    assert "garbage" in first_error(Record.load(out))


def test_a_server_that_dies_ends_it_and_can_be_resumed(out: Path) -> None:
    with serving("llama") as server:
        target = connect(server.url, seconds=5)

        def die(handler: Handler) -> None:
            server.shutdown()
            server.server_close()
            handler.connection.close()

        server.misbehave = lambda h, i: len(server.requests) == 2 and on_token(2, die)(h, i)
        with pytest.raises(DesksideError, match=r"talk: .*; 1 run is in .*--resume"):
            characterise(WORKLOAD, {"A": target}, out)
        port = server.server_address[1]
    record = Record.load(out)
    assert [r.ok for r in record.runs] == [True, False]
    with pytest.raises(DesksideError, match="cannot connect"):
        connect(f"http://127.0.0.1:{port}")


def test_a_slow_server_runs_into_the_timeout(llama: Server, out: Path) -> None:
    llama.misbehave = lambda h, i: (
        len(llama.requests) == 1 and on_token(1, lambda _: time.sleep(1))(h, i)
    )
    record = bench(llama, out, seconds=0.3)
    assert "was silent for 0 s; --timeout" in first_error(record) or "silent" in first_error(record)
    assert record.runs[1].ok


@pytest.mark.parametrize(
    ("body", "part"),
    [
        (b'{"error": {"message": "too hot", "code": 500}}', "HTTP 500: too hot"),
        (b'{"error": "plain"}', "HTTP 500: plain"),
        (b'{"detail": "fast api"}', "HTTP 500: fast api"),
        (b"<html>\n<b>Bad gateway</b>", "HTTP 500: <html> <b>Bad gateway</b>"),
        (b"\xff" * 5000, "HTTP 500"),
        (b"", "HTTP 500: nothing"),
    ],
)
def test_http_errors_are_told_in_one_line(llama: Server, out: Path, body: bytes, part: str) -> None:
    llama.refuse = (500, body)
    with pytest.raises(DesksideError) as failure:
        bench(llama, out)
    assert part in first_error(Record.load(out))
    assert "\n" not in str(failure.value) and len(first_error(Record.load(out))) < 400


def test_without_timings_the_stream_is_the_clock(out: Path) -> None:
    with serving("llama", timings=False, token_seconds=0.005) as server:
        run = bench(server, out).runs[0]
    assert run.clock == "stream" and run.prefill_seconds is None
    assert run.decode_seconds == pytest.approx(sum(run.gaps), abs=1e-5)
    assert run.decode_seconds is not None and run.decode_seconds >= 5 * 0.005
    assert run.prompt_tokens == 40


def test_without_usage_tokens_are_events(out: Path) -> None:
    with serving("openai", usage=False) as server:
        run = bench(server, out).runs[0]
    assert run.ok and run.generated_tokens == 6 and len(run.gaps) == 5


def test_a_stream_that_never_ends_is_ended(llama: Server, openai: Server, out: Path) -> None:
    def flood(event: dict[str, Any]) -> Callable[[Handler, int], bool]:
        def misbehave(handler: Handler, i: int) -> bool:
            for _ in range(10_000):
                handler.event(event)
            return True

        return misbehave

    floods = (
        (llama, {"content": "a", "stop": False}),
        (openai, {"choices": [{"text": "a"}]}),
    )
    for server, event in floods:
        server.misbehave = flood(event)
        with pytest.raises(DesksideError, match="more than the"):
            bench(server, out)


NONSENSE: list[Any] = [
    {"prompt_ms": "fast", "predicted_ms": None},
    {"prompt_ms": -5, "predicted_ms": 1},
    {"prompt_ms": float("nan"), "predicted_ms": float("inf")},
    {"prompt_ms": 1},
    [],
    "quick",
    None,
]


@pytest.mark.parametrize("timings", NONSENSE)
def test_nonsense_timings_are_no_timings(timings: Any) -> None:
    came = Arrivals(0.0, [(1.0, 1), (1.5, 1), (2.5, 2)])
    run = timed(came, timings, 3.0)
    assert run.clock == "stream" and run.prefill_seconds is None and run.decode_seconds == 1.5
    json.dumps(run.gaps, allow_nan=False)


def test_tokens_that_come_together_share_their_time() -> None:
    came = Arrivals(10.0, [(11.0, 2), (12.0, 1), (15.0, 3)])
    assert came.n == 6 and came.first == 1.0
    assert came.gaps() == [0.0, 1.0, 1.0, 1.0, 1.0]
    assert timed(came, None, 5.0, 6).gaps == came.gaps()
    # the server made more tokens than arrived as events: which gap is whose is not known
    more = timed(came, None, 5.0, 9)
    assert more.gaps == [] and more.generated_tokens == 9
    assert Arrivals(0.0).gaps() == []
    assert isinstance(more, Run)


def test_which_servers_and_models_there_are(
    llama: Server, openai: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert isinstance(connect(llama.url + "/v1/"), LlamaServer)
    assert isinstance(connect(openai.url), OpenAIServer)
    several = {"data": [{"id": "a"}, {"id": "b", "max_model_len": 77}, 5]}
    reply = Handler.reply

    def lists(handler: Handler, status: int, body: Any) -> None:
        reply(handler, status, several if handler.path == "/v1/models" else body)

    monkeypatch.setattr(Handler, "reply", lists)
    with pytest.raises(DesksideError, match=r"lists a, b.*--endpoint-model"):
        connect(openai.url)
    assert connect(openai.url, model="b").n_ctx == 77
    with pytest.raises(DesksideError, match="--endpoint http://"):
        connect("http://")
    for url in ("http://me:secret@127.0.0.1:1", "http://127.0.0.1:1/?key=secret"):
        with pytest.raises(DesksideError, match="must not be in it; use --api-key") as failure:
            connect(url)
        assert "secret" not in str(failure.value)
    assert is_local("localhost") and is_local("127.0.0.1") and not is_local("example.org")


def test_a_model_that_loads_is_waited_for_by_the_user(
    llama: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = {"error": {"code": 503, "message": "Loading model"}}
    monkeypatch.setattr(Handler, "do_GET", lambda handler: handler.reply(503, body))
    with pytest.raises(DesksideError, match=r"503: Loading model; try again when"):
        connect(llama.url)


def test_a_file_that_the_server_serves_gives_its_hash_and_ceiling(
    llama: Server, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rates, "bandwidth", lambda threads: 1e9)
    monkeypatch.setattr(rates, "compute", lambda threads, isa="": 1e12)
    reply = Handler.reply

    def names_a_file(handler: Handler, status: int, body: Any) -> None:
        if handler.path == "/props":
            body = {**body, "model_path": str(tiny())}
        reply(handler, status, body)

    monkeypatch.setattr(Handler, "reply", names_a_file)
    record = bench(llama, out)
    assert record.targets["A"].files[0].sha256 and record.runs[0].ceiling.decode_rate


def test_the_command(llama: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rates, "bandwidth", lambda threads: 1e9)
    monkeypatch.setattr(rates, "compute", lambda threads, isa="": 1e12)
    out = tmp_path / "x.json"
    small = ("-w", "chat", "--scale", "0.1", "--no-report")
    done = inside("bench", "--endpoint", llama.url, *small, "--out", out, "--api-key=secret")
    assert done.returncode == 0, done.stderr
    record = Record.load(out)
    assert len(record.runs) == 11 and all(r.ok for r in record.runs)
    assert "secret" not in out.read_text()
    replayed = tmp_path / "y.json"
    done = inside("bench", "--replay", out, "--out", replayed, "--no-report")
    assert done.returncode == 0, done.stderr
    prompts = [body["prompt"] for body in llama.requests]
    assert prompts[:11] == prompts[11:]
    monkeypatch.chdir(tmp_path)
    done = inside("bench", "-m", tiny(), "--vs", llama.url, *small)
    (made,) = (p for p in tmp_path.glob("*.json") if p not in (out, replayed))
    assert made.name.startswith("tiny-moe--vs-fake.gguf-chat-"), made.name
    assert len(Record.load(made).runs) == 22
    refused("bench", "--endpoint", llama.url, "-w", "article", part="has a context of 4096")
    where = ("--out", tmp_path / "z.json")
    asked = len(llama.requests)
    refused("bench", "--endpoint", llama.url, "--profile", *small, *where, part="--profile")
    assert len(llama.requests) == asked and not where[1].exists()
