from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deskside.errors import DesksideError
from deskside.text.streaming import StopStrings, StreamDecoder
from deskside.text.tokenizer import PRE_TOKENIZERS, Tokenizer

# GPT-2's stand-ins, stated here on their own: visible Latin-1 is itself, the rest counts from 256.
VISIBLE = [chr(b) for b in range(256) if chr(b).isprintable() and b not in (0x20, 0xA0, 0xAD)]
OTHERS = [b for b in range(256) if chr(b) not in VISIBLE]
STAND_IN = {b: chr(b) if chr(b) in VISIBLE else chr(256 + OTHERS.index(b)) for b in range(256)}

MERGES = [
    "h e",
    "l l",
    "he ll",
    "hell o",
    "Ġ w",
    "Ġw o",
    "1 2",
    "12 3",
    "Ã ©",
    "Ì ģ",
    "e Ìģ",
    "Ġ Ġ",
]
MERGED = [m.replace(" ", "") for m in MERGES]
EXTRA = {"<|endoftext|>": 3, "<|im_start|>": 3, "<|im_end|>": 3, "<think>": 4, "[PAD0]": 5}
TOKENS = [*STAND_IN.values(), *MERGED, *EXTRA]
ID = {piece: i for i, piece in enumerate(TOKENS)}


def toy_metadata(**changes: Any) -> dict[str, Any]:
    """All 256 bytes, a few merges, control, user-defined and unused tokens."""
    metadata = {
        "model": "gpt2",
        "pre": "qwen35",
        "tokens": TOKENS,
        "token_type": np.array([1] * (256 + len(MERGED)) + list(EXTRA.values()), dtype=np.int32),
        "merges": MERGES,
        "bos_token_id": ID["<|endoftext|>"],
        "eos_token_id": ID["<|im_end|>"],
    }
    metadata |= changes
    return {f"tokenizer.ggml.{k}": v for k, v in metadata.items() if v is not None}


def toy(**changes: Any) -> Tokenizer:
    return Tokenizer.from_metadata(toy_metadata(**changes), "toy.gguf")


TOYS = {pre: toy(pre=pre) for pre in PRE_TOKENIZERS}
TOY = TOYS["qwen35"]
TEXT = st.text(st.characters(exclude_categories=["Cs"]))
MIXED = st.lists(TEXT | st.sampled_from([*EXTRA, "hello", " wo", "123", "é"])).map("".join)


def cut(pre: str, text: str) -> list[str]:
    """The words that a pre-tokenizer makes, seen through a vocabulary that merges nothing."""
    split = TOYS[pre]._plain.pre_tokenizer
    assert split is not None
    return [text[a:b] for _, (a, b) in split.pre_tokenize_str(text)]


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
@given(text=MIXED, special=st.booleans())
def test_decoding_returns_what_was_encoded(pre: str, text: str, special: bool) -> None:
    tokenizer = TOYS[pre]
    ids = tokenizer.encode(text, special=special, add_bos=False)
    assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
@given(text=MIXED)
def test_words_partition_the_text(pre: str, text: str) -> None:
    assert "".join(cut(pre, text)) == text


@pytest.mark.parametrize(
    ("pre", "text", "words"),
    [
        ("qwen35", "it'S 1234", ["it", "'S", " ", "1", "2", "3", "4"]),
        ("qwen35", "cafe\u0301s", ["cafe\u0301s"]),
        ("qwen2", "cafe\u0301s", ["cafe", "\u0301s"]),
        ("qwen2", "f(x):\n\n  y", ["f", "(x", "):\n\n", " ", " y"]),
        ("llama-bpe", "12345", ["123", "45"]),
        ("gpt-2", "it'S 12345\n\n y", ["it", "'", "S", " 12345", "\n\n", " y"]),
        ("smollm", "a 12", ["a", " ", "1", "2"]),
        ("default", " a+12345", [" a", "+", "123", "45"]),
    ],
)
def test_words_of_each_pre_tokenizer(pre: str, text: str, words: list[str]) -> None:
    assert cut(pre, text) == words


def test_merges_apply_in_order_of_rank() -> None:
    pieces = [TOY.piece(i) for i in TOY.encode("hello hell éé")]
    assert pieces == ["hello", "Ġ", "hell", "Ġ", "Ã©", "Ã©"]


def test_llama3_takes_a_word_that_is_a_token_without_merging() -> None:
    merges = ["h e"]  # so that nothing but the vocabulary makes "hello" one token
    assert toy(pre="llama-bpe", merges=merges).encode("hello", add_bos=False) == [ID["hello"]]
    assert len(toy(merges=merges).encode("hello")) == 4


def test_special_tokens_are_plain_text_unless_asked_for() -> None:
    text = "<|im_start|>he<think><|im_end|>"
    ids = [ID["<|im_start|>"], ID["he"], ID["<think>"], ID["<|im_end|>"]]
    assert TOY.encode(text) == ids
    plain = TOY.encode(text, special=False)
    assert not set(plain) & {ids[0], ids[2], ids[3]}
    assert TOY.decode(plain) == text
    assert TOY.decode(ids) == text
    assert TOY.decode(ids, skip_control=True) == "he<think>"


def test_unused_tokens_are_not_recognised() -> None:
    assert ID["[PAD0]"] not in TOY.encode("[PAD0]")


def test_bos() -> None:
    bos = ID["<|endoftext|>"]
    assert TOY.encode("he") == [ID["he"]]
    assert TOY.encode("he", add_bos=True) == [bos, ID["he"]]
    adds = toy(add_bos_token=True)
    assert adds.encode("he") == [bos, ID["he"]]
    assert adds.encode("he", add_bos=False) == [ID["he"]]
    assert adds.encode("") == [bos]
    # llama.cpp's rule for this pre-tokenizer where the file does not say
    assert toy(pre="llama-bpe").encode("he") == [bos, ID["he"]]
    assert toy(pre="llama-bpe", add_bos_token=False).encode("he") == [ID["he"]]


def test_bos_without_a_bos_token_is_an_error() -> None:
    with pytest.raises(DesksideError, match="no bos token"):
        toy(bos_token_id=None).encode("he", add_bos=True)


def test_stop_ids() -> None:
    assert TOY.stop_ids == {ID["<|endoftext|>"], ID["<|im_end|>"]}
    assert toy(eot_token_id=ID["<think>"]).stop_ids == TOY.stop_ids | {ID["<think>"]}
    listed = np.array([ID["<think>"], -1, 10**6], np.int32)
    assert toy(eos_token_ids=listed).stop_ids == TOY.stop_ids | {ID["<think>"]}


@pytest.mark.parametrize("kind", [0, 1, 2, 4, 5])
def test_control_and_end_tokens_are_such_whatever_their_type(kind: int) -> None:
    types = toy_metadata()["tokenizer.ggml.token_type"].copy()
    ends = ID["<|endoftext|>"], ID["<|im_end|>"]
    types[list(ends)] = kind
    types[ID["<|im_start|>"]] = min(kind, 1)
    t = toy(token_type=types, eos_token_id=ends[0], bos_token_id=None)
    assert t.stop_ids == set(ends)
    assert all(t.is_control(i) for i in (*ends, ID["<|im_start|>"]))
    assert t.encode("<|im_start|>he<|im_end|>") == [ID["<|im_start|>"], ID["he"], ends[1]]
    assert t.decode([ID["he"], ends[1]], skip_control=True) == "he"


def test_an_end_token_that_text_can_become_stays_text() -> None:
    assert toy(eos_token_id=ID["hello"]).encode("hello", special=True) == [ID["hello"]]
    t = toy(eos_token_id=ID["Ġ"])
    assert ID["Ġ"] in t.stop_ids
    assert not t.is_control(ID["Ġ"])


@pytest.mark.parametrize("none", [-1, 2**32 - 1, len(TOKENS)])
def test_ids_outside_the_vocabulary_are_none(none: int) -> None:
    keys = ("bos_token_id", "eot_token_id", "eom_token_id", "unknown_token_id", "padding_token_id")
    t = toy(**dict.fromkeys(keys, none))
    assert t.bos_id is None
    assert t.stop_ids == TOY.stop_ids
    assert toy(eos_token_id=none).eos_id is None


def test_a_merge_that_cannot_apply_is_left_out() -> None:
    t = toy(merges=["zz h", *MERGES, "h zz", "z z"])
    assert t.encode("hello zz h") == TOY.encode("hello zz h")


def test_banned_are_the_unused_tokens_and_the_padding() -> None:
    n = TOY.n_vocab
    assert np.flatnonzero(TOY.banned(n + 3)).tolist() == [ID["[PAD0]"], n, n + 1, n + 2]
    with pytest.raises(DesksideError, match="rows"):
        TOY.banned(n - 1)


def test_token_bytes() -> None:
    assert b"".join(map(TOY.token_bytes, range(256))) == bytes(range(256))
    assert TOY.token_bytes(ID["Ġwo"]) == b" wo"
    assert TOY.token_bytes(ID["<think>"]) == b"<think>"
    assert TOY.token_bytes(ID["[PAD0]"]) == b"[PAD0]"


@pytest.mark.parametrize("token", [-1, len(TOKENS), 10**12, 1.5, "a", None])
def test_bad_ids_are_errors(token: Any) -> None:
    for use in (TOY.piece, TOY.token_bytes, TOY.is_control, lambda t: TOY.decode([t])):
        with pytest.raises(DesksideError, match=r"token id .* is not in 0\.\."):
            use(token)


def test_a_lone_surrogate_is_an_error() -> None:
    with pytest.raises(DesksideError, match="surrogate"):
        TOY.encode("a\ud800")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "llama"}, r"tokenizer\.ggml\.model is 'llama'"),
        ({"model": None}, r"tokenizer\.ggml\.model is None"),
        ({"pre": "tekken"}, r"tokenizer\.ggml\.pre is 'tekken'; known: .*qwen35.*default"),
        ({"pre": 3}, "pre is 3"),
        ({"tokens": None}, "tokens is missing"),
        ({"tokens": []}, "tokens is empty"),
        ({"tokens": np.arange(3)}, "tokens must be an array of strings"),
        ({"tokens": [*TOKENS[:-1], "a"]}, "tokens lists 'a' twice"),
        ({"token_type": np.ones(3, dtype=np.int32)}, "token_type has 3 entries"),
        ({"token_type": np.ones(len(TOKENS))}, "token_type must hold integers"),
        ({"token_type": np.full(len(TOKENS), 9)}, "token_type must hold integers"),
        ({"token_type": ["1"] * len(TOKENS)}, "token_type must hold integers"),
        ({"merges": None}, "merges is missing"),
        ({"merges": "h e"}, "merges must be an array of strings"),
        ({"merges": ["h e", "he"]}, "merges entry 1 is 'he', not two tokens"),
        ({"merges": ["h e l"]}, "merges entry 0 is 'h e l', not two tokens"),
        ({"eot_token_id": "x"}, "eot_token_id must be an integer"),
        ({"add_bos_token": 1}, "add_bos_token must be a bool"),
        ({"eos_token_ids": [3, 4]}, "eos_token_ids must be a list of integers"),
        ({"add_bos_token": True, "bos_token_id": None}, "bos_token_id is missing"),
        ({"add_bos_token": True, "bos_token_id": -1}, "bos_token_id is missing"),
    ],
)
def test_malformed_metadata_is_a_one_line_error(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DesksideError, match=f"^toy.gguf: .*{message}") as caught:
        toy(**changes)
    assert "\n" not in str(caught.value)


@given(
    key=st.sampled_from([k.removeprefix("tokenizer.ggml.") for k in toy_metadata()]),
    value=st.integers()
    | st.floats()
    | st.booleans()
    | st.text()
    | st.lists(st.text("he ", max_size=3))
    | st.lists(st.integers(-9, 300), max_size=4).map(np.array)
    | st.just(np.full(len(TOKENS), -1)),
)
def test_metadata_of_any_kind_loads_or_is_a_one_line_error(key: str, value: Any) -> None:
    try:
        tokenizer = toy(**{key: value})
    except DesksideError as error:
        assert "\n" not in str(error)
    else:
        tokenizer.decode(tokenizer.encode("hello <think>"))


def test_a_missing_pre_tokenizer_means_default_and_missing_types_mean_normal() -> None:
    assert toy(pre=None).pre == "default"
    assert toy(token_type=None).encode("<think>") != [ID["<think>"]]
    assert toy(merges=np.zeros(0, dtype=np.int32)).encode("he") == [ID["h"], ID["e"]]


# Streams.

# Any ids, so that bytes meet in ways that no text would make them.
IDS = st.lists(st.integers(0, len(TOKENS) - 1))


@given(ids=IDS, skip=st.booleans())
def test_streamed_pieces_join_to_the_whole_decode(ids: list[int], skip: bool) -> None:
    stream = StreamDecoder(TOY, skip_control=skip)
    pieces = [stream.push(i) for i in ids]
    assert "".join(pieces) + stream.flush() == TOY.decode(ids, skip_control=skip)


@given(text=TEXT)
def test_a_stream_never_emits_half_a_character(text: str) -> None:
    stream, shown = StreamDecoder(TOY), ""
    for byte in text.encode():
        shown += stream.push(byte_id(byte))
        assert text.startswith(shown)
    assert shown == text
    assert stream.flush() == ""


def byte_id(byte: int) -> int:
    return ID[STAND_IN[byte]]


def test_invalid_bytes_are_replaced_once_they_cannot_complete() -> None:
    stream = StreamDecoder(TOY)
    assert [stream.push(byte_id(b)) for b in b"\xe4\xb8A\xf0"] == ["", "", "\ufffdA", ""]
    assert stream.flush() == "\ufffd"
    assert stream.flush() == ""


# Stop strings.

LETTERS = st.text("ab", max_size=12)


@given(chunks=st.lists(LETTERS), stop=st.text("ab", min_size=1, max_size=5))
def test_one_stop_string_cuts_where_str_find_says(chunks: list[str], stop: str) -> None:
    text = "".join(chunks)
    at = text.find(stop)
    shown, hit = stream_through([stop], chunks)
    assert hit == (at >= 0)
    assert shown == (text[:at] if hit else text)


@given(chunks=st.lists(LETTERS), stops=st.lists(st.text("ab", min_size=1, max_size=5)))
def test_several_stop_strings_cut_at_the_first_to_end(chunks: list[str], stops: list[str]) -> None:
    text = "".join(chunks)
    expected = text
    for end in range(len(text) + 1):
        ending = [len(s) for s in stops if text[:end].endswith(s)]
        if ending:
            expected = text[: end - max(ending)]
            break
    assert stream_through(stops, chunks) == (expected, expected != text)


def stream_through(stops: list[str], chunks: list[str]) -> tuple[str, bool]:
    cutter, shown = StopStrings(stops), ""
    for chunk in chunks:
        emitted, hit = cutter.push(chunk)
        shown += emitted
        assert hit == cutter.hit
    return shown + cutter.flush(), cutter.hit


def test_text_that_cannot_begin_a_stop_string_is_shown_at_once() -> None:
    cutter = StopStrings(["</s>"])
    assert cutter.push("hi <") == ("hi ", False)
    assert cutter.push("b") == ("<b", False)
    assert cutter.push("</s") == ("", False)
    assert cutter.push(">more") == ("", True)
    assert cutter.push("after") == ("", True)
    assert cutter.flush() == ""


def test_an_empty_stop_string_is_an_error() -> None:
    with pytest.raises(DesksideError, match="stop"):
        StopStrings(["a", ""])
