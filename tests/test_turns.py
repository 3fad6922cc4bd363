"""A chat's next turn computes only what is new; several answers live on one model."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from functools import cache
from importlib import resources
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deskside import LLM, SamplingParams
from deskside.bench.record import Record
from deskside.bench.workload import Workload
from deskside.engine.config import demo_model
from deskside.errors import DesksideError
from deskside.gguf import GGUF
from deskside.text.chat import ChatTemplate
from deskside.text.prompt import Prompt, chat_prompt
from deskside.text.tokenizer import Tokenizer
from tests.commands import command


@cache
def _tokenizer() -> Tokenizer:
    return Tokenizer.from_metadata(GGUF.open(demo_model()).metadata, "demo")


QUESTIONS = (
    "Hello, who are you?",
    "What does os.path.join do?",
    "And what can you not do?",
    "What is a dict?",
)
SLACK = 8  # tokens of a turn beyond those that are new
GREEDY = SamplingParams(max_tokens=40, temperature=0, ignore_eos=True)


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(demo_model(), ctx=2048, threads=1)


@pytest.fixture
def thinking(llm: LLM) -> Iterator[LLM]:
    """With Qwen3.5's template, which drops the thinking of earlier answers."""
    source = resources.files("deskside") / "data" / "qwen35-chat-template.jinja"
    llm.__dict__["template"] = ChatTemplate(source.read_text("utf-8"))
    yield llm
    del llm.__dict__["template"]


def turn(
    llm: LLM, messages: list[dict[str, str]], tokens: int, stop_after: int | None = None
) -> str:
    """One turn; asserts how much of the prompt it computes. stop_after: tokens until Ctrl-C."""
    prompt = llm.prompt(messages)
    shared = llm.loaded.slots[0].shared(prompt.tokens)
    stream = llm.stream(prompt, SamplingParams(max_tokens=tokens, temperature=0))
    pieces = ["<think>\n"] if prompt.thinks else []
    for n, chunk in enumerate(stream, start=1):
        pieces.append(chunk.text)
        if n == stop_after:
            break
    t = stream.timings
    assert t.prompt_tokens + t.cached_tokens == len(prompt.tokens)
    assert t.prompt_tokens <= len(prompt.tokens) - shared + SLACK
    # All that was said before is shared, but for thinking and what closes a message.
    if len(messages) > 1:
        assert shared >= len(llm.prompt(messages[:1]).tokens) - SLACK
    return "".join(pieces)


@pytest.mark.parametrize("stop_after", [None, 5])
def test_a_turn_computes_only_what_is_new(llm: LLM, stop_after: int | None) -> None:
    llm.reset()
    messages: list[dict[str, str]] = []
    computed = []
    for question in QUESTIONS:
        messages.append({"role": "user", "content": question})
        answer = turn(llm, messages, 60, stop_after)
        messages.append({"role": "assistant", "content": answer})
        computed.append(len(llm.loaded.slots[0].tokens))
    assert computed == sorted(computed)


@pytest.mark.parametrize("stop_after", [None, 7])
def test_a_turn_that_drops_thinking_goes_on_behind_the_opener(
    thinking: LLM, stop_after: int | None
) -> None:
    thinking.reset()
    messages: list[dict[str, str]] = []
    for question in QUESTIONS:
        messages.append({"role": "user", "content": question})
        thoughts = turn(thinking, messages, 30, stop_after)
        if stop_after is None:
            thoughts += "\n</think>\n\nThat is that."
        messages.append({"role": "assistant", "content": thoughts})


def test_tool_rounds_then_a_user_message_return_to_the_first_opener(thinking: LLM) -> None:
    """All thinking since the last user message goes at once, several answers back."""
    thinking.reset()
    messages: list[dict[str, str]] = [{"role": "user", "content": "Do it."}]
    for i in range(4):
        thoughts = turn(thinking, messages, 20)
        said = {"role": "assistant", "content": thoughts + f"\n</think>\n\nStep {i}."}
        messages += [said, {"role": "tool", "content": "done " * 10}]
    messages.append({"role": "user", "content": "Thanks. And now?"})
    turn(thinking, messages, 10)


def test_a_message_asked_anew_keeps_what_was_before_it(llm: LLM) -> None:
    llm.reset()
    messages = [{"role": "user", "content": "What does os.path.join do? " * 8}]
    messages.append({"role": "assistant", "content": turn(llm, messages, 60)})
    turn(llm, [*messages, {"role": "user", "content": "What is a dict?"}], 10)
    turn(llm, [*messages, {"role": "user", "content": "Who are you?"}], 10)
    turn(llm, [*messages, {"role": "user", "content": "Who are you?"}], 10)  # again, as it is


def test_what_continues_from_a_checkpoint_is_what_is_computed_anew(llm: LLM) -> None:
    llm.reset()
    first = llm.prompt([{"role": "user", "content": "What is a list?"}])
    llm.generate(first, GREEDY)
    other = [*first.tokens, *llm.tokenize("A tuple is")]
    cut = llm.generate(Prompt(other), GREEDY)
    assert cut.timings.cached_tokens == first.marks[-1] < len(first.tokens)
    llm.reset()
    assert llm.generate(other, GREEDY).tokens == cut.tokens


@settings(deadline=None, max_examples=60)
@given(st.text(alphabet=" \nab<|>im_endstr", max_size=30), st.data())
def test_computed_tokens_never_change_the_text(text: str, data: st.DataObject) -> None:
    tokenizer = _tokenizer()
    whole = f"<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n{text}<|im_end|>\n"
    canonical = tokenizer.encode(whole, add_bos=False)
    # Other tokens of the same text: some read piece by piece.
    held: list[int] = []
    for token in canonical:
        piece = tokenizer.decode([token])
        apart = data.draw(st.booleans()) and not tokenizer.is_control(token)
        held += [i for c in piece for i in tokenizer.encode(c, add_bos=False)] if apart else [token]
    held = held[: data.draw(st.integers(0, len(held)))]
    for end in ("", "<|im_start|>user\nmore<|im_end|>\n"):
        got = chat_prompt(tokenizer, whole + end, held)
        assert tokenizer.decode(got.tokens) == whole + end


def test_answers_of_one_model_are_those_of_each_alone() -> None:
    llm = LLM(demo_model(), ctx=512, threads=1, parallel=3, ubatch=24)
    prompts = [llm.chat([{"role": "user", "content": q}]) for q in QUESTIONS[:3]]
    alone = [llm.generate(p, GREEDY).tokens for p in prompts]
    llm.reset()
    answers = [llm.begin(p, GREEDY) for p in prompts]
    texts = dict.fromkeys(answers, "")
    # The third begins late, the first is ended early.
    for step in range(200):
        for answer, chunk in llm.step(answers[: 2 + (step > 3)]):
            texts[answer] += chunk.text
        if len(answers[0].tokens) == 9:
            answers[0].end("cancelled")
        if all(a.done for a in answers):
            break
    assert answers[0].stop_reason == "cancelled" and answers[0].tokens == alone[0][:9]
    assert [a.tokens for a in answers[1:]] == alone[1:]
    assert all(llm.detokenize(a.tokens).startswith(texts[a]) for a in answers)


def test_a_fourth_answer_takes_the_place_of_the_oldest() -> None:
    llm = LLM(demo_model(), ctx=256, threads=1, parallel=2)
    first, second, third = (llm.stream(llm.tokenize(q), GREEDY) for q in QUESTIONS[:3])
    next(first), next(second), next(third)
    with pytest.raises(DesksideError, match="another one took its slot"):
        next(first)
    assert len(list(second)) and len(list(third))


def test_a_step_that_fails_ends_its_sequence_and_spares_the_model(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm.reset()
    prompt = llm.prompt([{"role": "user", "content": QUESTIONS[1]}])
    expected = llm.generate(prompt, GREEDY).tokens
    llm.reset()
    stream = llm.stream(prompt, GREEDY)
    for _ in range(5):
        next(stream)

    def breaks(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(llm.loaded.backend, "run", breaks)
        with pytest.raises(KeyboardInterrupt):
            next(stream)
    assert list(stream) == [] and stream.stop_reason == "failed"
    again = llm.generate(prompt, GREEDY)
    assert again.tokens == expected
    assert again.timings.cached_tokens == prompt.marks[-1]  # the checkpoint was spared


def test_a_step_never_takes_a_slot_from_itself() -> None:
    llm = LLM(demo_model(), ctx=256, threads=1, parallel=2)
    first, second, third = (llm.begin(llm.tokenize(q), GREEDY) for q in QUESTIONS[:3])
    llm.step([first, second])
    llm.step([first, third])
    assert first.slot is not third.slot
    while not (first.done and third.done):
        llm.step([first, third])
    with pytest.raises(DesksideError, match="another one took its slot"):
        llm.step([second])
    with pytest.raises(DesksideError, match="3 sequences at once"):
        llm.step([llm.begin([50], GREEDY) for _ in range(3)])


def test_threads_share_a_model() -> None:
    """Each with its own answers; steps take turns."""
    llm = LLM(demo_model(), ctx=256, threads=1, parallel=2)
    prompts = [llm.chat([{"role": "user", "content": q}]) for q in QUESTIONS]
    expected = [llm.generate(p, GREEDY).tokens for p in prompts]
    got: dict[int, list[int]] = {}

    def run(own: range) -> None:
        for i in own:
            got[i] = llm.generate(prompts[i], GREEDY).tokens

    threads = [threading.Thread(target=run, args=(range(i, 4, 2),)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [got[i] for i in range(4)] == expected


def test_the_chat_workload_measures_what_a_chat_gets(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Thinking is dropped, and all before it comes from the cache."""
    out = tmp_path / "r.json"
    words = ["bench", "-w", "chat", "--scale", "0.15", "--out", str(out), "-t", "1"]
    assert command(capsys, *words)[0] == 0
    record = Record.load(out)
    items = Workload.read("chat").shrunk(0.15).items
    assert all(item.thinking for item in items)
    before = 0
    for run, item in zip(record.runs, items, strict=True):
        if item.continues:
            # the answer without its thinking, the new text, and what is behind the mark
            assert run.prompt_tokens == before + item.prompt + 2
        before = item.generate - item.thinking


def test_logits_of_one_thread_are_not_mixed_with_anothers_answer() -> None:
    llm = LLM(demo_model(), ctx=256, threads=1)
    pieces = llm.logits_from(list(range(50, 90)), 0, 8)
    next(pieces)
    llm.generate([50, 51], GREEDY)
    with pytest.raises(DesksideError, match="another one took its slot"):
        next(pieces)
