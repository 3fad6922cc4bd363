"""The public contract: LLM, logits, generate, tokenize."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deskside import LLM, DesksideError, SamplingParams
from deskside.machine.system import usable_cores
from tests.models import rewrite, tiny

IDS = np.random.default_rng(1).integers(0, 2000, 40).tolist()
GREEDY = SamplingParams(max_tokens=12, temperature=0)


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(tiny(), ctx=256)


def test_text_and_tokens_give_the_same_answer(llm: LLM) -> None:
    text = "def add(a, b):\n    return"
    ids = llm.tokenize(text)
    assert llm.detokenize(ids) == text
    assert llm.generate(text, GREEDY).tokens == llm.generate(ids, GREEDY).tokens


def test_greedy_takes_the_largest_logit_of_tokens_that_exist(llm: LLM) -> None:
    out = llm.generate(IDS, GREEDY)
    logits = llm.logits(IDS + out.tokens)
    logits[:, llm.tokenizer.banned(llm.tape.n_vocab)] = -np.inf
    best = logits[len(IDS) - 1 : -1].argmax(-1)
    assert out.tokens == best.tolist()
    assert out.stop_reason == "length" and out.timings.generated_tokens == 12


def test_same_seed_same_text(llm: LLM) -> None:
    def text(seed: int) -> str:
        return llm.generate(IDS, SamplingParams(max_tokens=20, temperature=1.5, seed=seed)).text

    assert text(7) == text(7)
    assert len({text(seed) for seed in range(5)}) > 1


def test_padding_is_never_sampled(llm: LLM) -> None:
    params = SamplingParams(max_tokens=150, temperature=50, top_k=0, top_p=1, min_p=0, seed=1)
    tokens = np.array(llm.generate(IDS, params).tokens)
    banned = llm.tokenizer.banned(llm.tape.n_vocab)
    assert banned.any() and not banned[tokens].any()


def test_ignore_eos_goes_on_and_bias_can_force_the_end(llm: LLM) -> None:
    end = max(llm.tokenizer.stop_ids)
    forced = SamplingParams(max_tokens=9, logit_bias={end: 1000.0})
    out = llm.generate(IDS, forced)
    assert out.tokens == [] and out.stop_reason == "stop"
    stubborn = SamplingParams(max_tokens=9, logit_bias={end: 1000.0}, ignore_eos=True)
    assert len(llm.generate(IDS, stubborn).tokens) == 9


def test_a_stop_string_ends_the_text_before_it(llm: LLM) -> None:
    whole = llm.generate(IDS, SamplingParams(max_tokens=30, temperature=0)).text
    stop = whole[10:13]
    out = llm.generate(IDS, SamplingParams(max_tokens=30, temperature=0, stop=(stop,)))
    assert out.text == whole[: whole.index(stop)] and out.stop_reason == "stop"


def test_streamed_chunks_add_up(llm: LLM) -> None:
    stream = llm.stream(IDS, GREEDY)
    text = "".join(chunk.text for chunk in stream)
    assert text == llm.generate(IDS, GREEDY).text
    assert stream.stop_reason == "length"


def test_a_continued_prompt_reuses_the_cache(llm: LLM) -> None:
    llm.reset()
    first = llm.generate(IDS, GREEDY)
    longer = IDS + first.tokens[:-1] + [5, 6, 7]
    again = llm.generate(longer, GREEDY)
    assert again.timings.cached_tokens == len(IDS) + len(first.tokens) - 1
    assert again.timings.prompt_tokens == 3
    llm.reset()
    fresh = llm.generate(longer, GREEDY)
    assert fresh.timings.cached_tokens == 0 and fresh.tokens == again.tokens


def test_keys_and_values_are_cut_back_where_nothing_else_is_carried() -> None:
    llm = LLM(tiny("tiny-llama", "F32"), ctx=256)
    first = llm.generate(IDS, GREEDY)
    again = llm.generate(IDS, GREEDY)
    assert again.tokens == first.tokens and again.timings.cached_tokens == len(IDS) - 1
    other = [*IDS[:25], 7, 8, 9]
    cut = llm.generate(other, GREEDY)
    assert cut.timings.cached_tokens == 25
    llm.reset()
    assert llm.generate(other, GREEDY).tokens == cut.tokens


def test_a_stream_ends_when_another_generation_begins(llm: LLM) -> None:
    first = llm.stream(IDS, GREEDY)
    next(first)
    llm.generate(IDS[:5], GREEDY)
    with pytest.raises(DesksideError, match="another one took its slot"):
        next(first)


def test_an_interrupted_step_leaves_a_model_that_works() -> None:
    slow = LLM(tiny(), ctx=8192, ubatch=8192)
    expected = slow.generate(IDS, GREEDY).tokens
    timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        while True:
            slow.logits(IDS * 200)
    timer.cancel()
    assert slow.generate(IDS, GREEDY).tokens == expected


def test_generation_ends_with_the_context() -> None:
    llm = LLM(tiny(), ctx=48)
    out = llm.generate(IDS, SamplingParams(max_tokens=None, temperature=0, ignore_eos=True))
    # The token that no longer fits is known but cannot be computed on.
    assert out.stop_reason == "context" and len(IDS) + len(out.tokens) == 48 + 1


def test_context_zero_is_the_models_own() -> None:
    llm = LLM(tiny(), ctx=0)
    assert llm.ctx == llm.tape.n_ctx_train == 8192


def test_more_threads_than_cores_run_as_many_as_there_are() -> None:
    llm = LLM(tiny(), ctx=64, threads=4096)
    assert llm.config.n_threads == usable_cores()
    (note,) = llm.notes
    assert note.startswith(f"-t 4096: this process may use {usable_cores()} cores")
    assert not LLM(tiny(), ctx=64, threads=usable_cores()).notes
    assert len(llm.generate(IDS, GREEDY).tokens) == 12


def test_zero_tokens_may_be_asked_for(llm: LLM) -> None:
    out = llm.generate(IDS, SamplingParams(max_tokens=0))
    assert out.text == "" and out.tokens == [] and out.stop_reason == "length"


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"ctx": -1}, "-c"),
        ({"ctx": 9000}, "8192"),
        ({"threads": -2}, "-t"),
        ({"ubatch": 0}, "-ub"),
        ({"ctk": "q3"}, "-ctk q3"),
        ({"ctv": "iq4_nl"}, "-ctv iq4_nl"),
        ({"backend": "tpu"}, "tpu"),
        ({"isa": "avx9000"}, "avx9000"),
        ({"isa": 5}, "isa"),
        ({"ctk": None}, "ctk"),
        ({"speed": 11}, "speed"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], part: str) -> None:
    with pytest.raises(DesksideError, match=part):
        LLM(tiny(), **options)


def test_bad_prompts_are_refused(llm: LLM) -> None:
    for prompt, part in (
        ([], "empty"),
        ("", "empty"),
        ([1] * 257, "257 tokens"),
        ([99999], "99999"),
    ):
        with pytest.raises(DesksideError, match=part):
            llm.generate(prompt)
    for ids in ([1.5, 2.5], ["a"], [[1, 2]]):
        with pytest.raises(DesksideError, match="flat list"):
            llm.logits(ids)  # type: ignore[arg-type]
    with pytest.raises(DesksideError, match="add up"):
        llm.logits(IDS, chunks=[1, 2])


def test_nan_weights_are_found_and_named(tmp_path: Path) -> None:
    bad = np.ones(256, np.float32)
    bad[3] = np.nan
    path = rewrite(tiny(), tmp_path / "m.gguf", replace={"blk.1.attn_norm.weight": bad})
    with pytest.raises(DesksideError, match=r"m\.gguf.*blk\.1\.attn_norm\.weight"):
        LLM(path)


def test_nan_weights_of_a_large_file_are_found_when_they_matter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from deskside.engine import load as engine

    monkeypatch.setattr(engine, "CHECK_BYTES", 0)
    # An F16 tensor: not among those that are always checked.
    half = tiny("tiny-dense", "F16")
    data = bytearray(half.read_bytes())
    from deskside.gguf import GGUF

    info = GGUF.open(half).tensors["blk.2.ffn_up.weight"]
    data[info.offset : info.offset + 2] = np.array([np.inf], "<f2").tobytes()
    path = tmp_path / "m.gguf"
    path.write_bytes(data)
    llm = LLM(path, ctx=64)
    with pytest.raises(DesksideError, match=r"blk\.2\.ffn_up\.weight"):
        llm.logits(IDS)
    with pytest.raises(DesksideError, match=r"blk\.2\.ffn_up\.weight"):
        llm.generate(IDS, GREEDY)


def test_a_cache_beyond_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from deskside.engine import load as engine

    monkeypatch.setattr(engine, "available_memory", lambda: 100_000)
    with pytest.raises(DesksideError, match=r"-c 4096 needs .* GB"):
        LLM(tiny())


def test_a_forked_process_gets_one_error_and_may_load_anew() -> None:
    llm = LLM(tiny(), threads=2, ctx=64)
    want = llm.generate("a", GREEDY).tokens
    held, let_go = threading.Event(), threading.Event()

    def hold() -> None:  # a thread that computes while another one forks
        with llm.loaded.turn:
            held.set()
            let_go.wait(60)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait(60)
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            llm.generate("a", GREEDY)
        except DesksideError as error:
            anew = LLM(tiny(), threads=2, ctx=64).generate("a", GREEDY).tokens
            code = 0 if "before a fork" in str(error) and anew == want else 2
        finally:
            os._exit(code)
    let_go.set()
    thread.join()
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert llm.generate("a", GREEDY).tokens == want
