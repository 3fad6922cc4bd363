"""Text to token ids and back: byte-level BPE from GGUF metadata.

The vocabulary follows GPT-2. Every byte has a printable stand-in character, a token is a string
of stand-ins, and merges are pairs of tokens in order of rank. Models differ in how they cut text
into words before merging (`tokenizer.ggml.pre`). The cuts below are those of llama.cpp for the same
name.

As in llama.cpp, text is not normalised, so decoding returns exactly the text that was encoded.
(HF's Qwen tokenizers apply NFC first.)
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import tokenizers
from tokenizers import AddedToken, Regex, pre_tokenizers
from tokenizers.models import BPE

from deskside.errors import DesksideError

# tokenizer.ggml.token_type
_NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
_LAST_TYPE = 6

# Tokens that end a turn in one chat format or another. A model's eos is often <|endoftext|> while
# its chats end in another token (or the reverse), so any of these stops, whatever its type.
STOP_PIECES = frozenset(
    {
        "<|im_end|>",
        "<|endoftext|>",
        "<|end_of_text|>",
        "<|eot_id|>",
        "<|eom_id|>",
        "<|eot|>",
        "<|end|>",
        "<|return|>",
        "<|call|>",
        "<end_of_turn>",
        "<end_of_utterance>",
        "<EOT>",
        "_<EOT>",
        "[EOT]",
        "<\uff5cend\u2581of\u2581sentence\uff5c>",
    }
)
# How control tokens are spelled: with bars, which are full-width in DeepSeek's.
_CONTROL_SPELLING = re.compile(r"<([|\uff5c])[^\s|\uff5c]+\1>")


def _word_cut(letters: str, digits: str) -> str:
    """The cut shared by Llama 3 and Qwen: contractions, words, digits, punctuation, space."""
    return (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
        rf"|[^\r\n\p{{L}}\p{{N}}]?[{letters}]+"
        rf"|{digits}"
        rf"| ?[^\s{letters}\p{{N}}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )


_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

# name -> cuts applied one after another, each to the pieces that the previous one left.
# A match is a piece, and so is what lies between two matches.
PRE_TOKENIZERS: dict[str, tuple[str, ...]] = {
    "qwen35": (_word_cut(r"\p{L}\p{M}", r"\p{N}"),),
    "qwen2": (_word_cut(r"\p{L}", r"\p{N}"),),
    "llama-bpe": (_word_cut(r"\p{L}", r"\p{N}{1,3}"),),
    "smollm": (r"\p{N}", _GPT2),
    "gpt-2": (_GPT2,),
    "default": (r"[\p{P}$+<=>^~|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"),
}
# A word that is a token as a whole is taken without merging; and bos is added unless the file
# says otherwise.
_LLAMA3 = frozenset({"llama-bpe"})


def _byte_of_char() -> dict[str, int]:
    """GPT-2's stand-ins: printable Latin-1 bytes stand for themselves, the rest for 256, 257, …"""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in set(printable)]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


_BYTE_OF_CHAR = _byte_of_char()


class Tokenizer:
    """A byte-level BPE vocabulary.

    pieces: the tokens as the file spells them. types: int array, GGUF token types; what ends an
    answer or is spelled as a control token is one, whatever the file says.
    bos_id, eos_id: int or None. add_bos: whether `encode` puts bos first by default.
    stop_ids: ids that end an answer. pre: the pre-tokenizer's name.
    """

    def __init__(
        self,
        pieces: Sequence[str],
        types: np.ndarray,
        merges: Sequence[tuple[str, str]],
        pre: str,
        *,
        bos_id: int | None = None,
        eos_id: int | None = None,
        stop_ids: Iterable[int] = (),
        add_bos: bool = False,
    ) -> None:
        self.pieces = pieces
        self.pre = pre
        self.bos_id = bos_id
        self.eos_id = eos_id
        self.add_bos = add_bos
        named = {i for i, piece in enumerate(pieces) if piece in STOP_PIECES}
        self.stop_ids = frozenset(named | set(stop_ids))
        self.types = _with_control(types, pieces, merges, self.stop_ids)
        types = self.types

        model = BPE(
            vocab={piece: i for i, piece in enumerate(pieces)},
            merges=merges,
            ignore_merges=pre in _LLAMA3,
        )
        cuts = [pre_tokenizers.Split(Regex(cut), "isolated") for cut in PRE_TOKENIZERS[pre]]
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        # Both share the model; only `_special` recognises tokens by their spelling.
        self._plain = tokenizers.Tokenizer(model)
        self._special = tokenizers.Tokenizer(model)
        self._plain.pre_tokenizer = self._special.pre_tokenizer = pre_tokenizers.Sequence(
            [*cuts, byte_level]
        )
        spelled = np.flatnonzero((types == CONTROL) | (types == USER_DEFINED)).tolist()
        self._special.add_special_tokens(
            [AddedToken(pieces[i], special=True, normalized=False) for i in spelled]
        )

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any], source: str) -> Tokenizer:
        """Build from `tokenizer.ggml.*`; `source` is the file's name, for error messages."""
        return _from_metadata(metadata, source)

    @property
    def n_vocab(self) -> int:
        """Number of tokens in the file (the model's output may have more rows: padding)."""
        return len(self.pieces)

    def encode(self, text: str, *, special: bool = True, add_bos: bool | None = None) -> list[int]:
        """Token ids of `text`.

        special: control and user-defined tokens are recognised by their spelling; False reads
        every spelling as plain text. add_bos: put bos first; None does what the file says.
        """
        reader = self._special if special else self._plain
        try:
            ids = reader.encode(text, add_special_tokens=False).ids
        except (TypeError, UnicodeEncodeError):
            raise DesksideError(
                "the text to tokenize is not valid Unicode (it holds a lone surrogate); "
                "decode its bytes with errors='replace'"
            ) from None
        if self.add_bos if add_bos is None else add_bos:
            if self.bos_id is None:
                raise DesksideError("add_bos: this vocabulary has no bos token")
            ids.insert(0, self.bos_id)
        return ids

    def piece(self, token: int) -> str:
        """The token as the file spells it (byte stand-ins for ordinary tokens)."""
        return self.pieces[self._checked(token)]

    def token_bytes(self, token: int) -> bytes:
        """The bytes that a token stands for. Control and user-defined tokens: their spelling."""
        piece = self.piece(token)
        if self.types[token] not in (CONTROL, USER_DEFINED):
            try:
                return bytes([_BYTE_OF_CHAR[c] for c in piece])
            except KeyError:
                pass  # not made of stand-ins (an unused token's label, say): its own spelling
        return piece.encode()

    def is_control(self, token: int) -> bool:
        return bool(self.types[self._checked(token)] == CONTROL)

    def decode(self, ids: Iterable[int], *, skip_control: bool = False) -> str:
        """The text of `ids`; bytes that are not UTF-8 become U+FFFD."""
        kept = (i for i in ids if not (skip_control and self.is_control(i)))
        return b"".join(map(self.token_bytes, kept)).decode("utf-8", "replace")

    def banned(self, n_vocab: int) -> np.ndarray:
        """Bool (n_vocab,): ids that must never be sampled.

        These are the file's unused tokens (padding such as [PAD7]) and the rows of a padded
        output, n_vocab of them in all, that have no token.
        """
        if n_vocab < self.n_vocab:
            raise DesksideError(
                f"the model's output has {n_vocab} rows but the vocabulary {self.n_vocab} tokens"
            )
        mask = np.ones(n_vocab, dtype=bool)
        mask[: self.n_vocab] = self.types == UNUSED
        return mask

    def _checked(self, token: int) -> int:
        if not isinstance(token, int | np.integer) or not 0 <= token < self.n_vocab:
            raise DesksideError(f"token id {token!r:.40} is not in 0..{self.n_vocab - 1}")
        return token


def _with_control(
    types: np.ndarray,
    pieces: Sequence[str],
    merges: Sequence[tuple[str, str]],
    stop_ids: Iterable[int],
) -> np.ndarray:
    """`types`, with CONTROL for tokens that end an answer and for those spelled as control tokens.

    Many files call them normal or user-defined. What text can become by merging stays as it is.
    """
    merged = {left + right for left, right in merges}
    normal = np.flatnonzero(types <= _NORMAL).tolist()
    spelled = [i for i in normal if _CONTROL_SPELLING.fullmatch(pieces[i])]
    found = [i for i in (*stop_ids, *spelled) if len(pieces[i]) > 1 and pieces[i] not in merged]
    types = types.copy()
    types[found] = CONTROL
    return types


def _from_metadata(metadata: Mapping[str, Any], source: str) -> Tokenizer:
    found = _Metadata(metadata, source)
    pre, pieces = found.pre(), found.pieces()
    types, merges = found.types(len(pieces)), found.merges(pieces)
    bos_id = found.token_id("bos_token_id", len(pieces))
    add_bos = found.add_bos(pre, bos_id)
    eos_id, *others = (
        found.token_id(f"{name}_token_id", len(pieces)) for name in ("eos", "eot", "eom")
    )
    stop_ids = [i for i in (eos_id, *others) if i is not None]
    try:
        return Tokenizer(
            pieces,
            types,
            merges,
            pre,
            bos_id=bos_id,
            eos_id=eos_id,
            stop_ids=[*stop_ids, *found.token_ids("eos_token_ids", len(pieces))],
            add_bos=add_bos,
        )
    except Exception as error:  # the type that `tokenizers` raises
        raise DesksideError(f"{source}: {error}") from error


class _Metadata:
    """`tokenizer.ggml.*` of a file. DesksideError names the file and the key that is bad."""

    def __init__(self, metadata: Mapping[str, Any], source: str) -> None:
        self._metadata = metadata
        self._source = source

    def get(self, key: str) -> Any:
        return self._metadata.get(f"tokenizer.ggml.{key}")

    def fail(self, key: str, reason: str) -> DesksideError:
        return DesksideError(f"{self._source}: tokenizer.ggml.{key} {reason}")

    def strings(self, key: str) -> list[str]:
        value = self.get(key)
        if value is None:
            raise self.fail(key, "is missing: the file has no usable tokenizer")
        if len(value) == 0 if isinstance(value, np.ndarray) else value == []:
            return []  # GGUF readers may type an empty array either way
        if not isinstance(value, list) or not all(isinstance(s, str) for s in value):
            raise self.fail(key, "must be an array of strings")
        return value

    def token_id(self, key: str, n_tokens: int) -> int | None:
        """None where the file has none: -1, or what it became in 32 bits, and other ids outside the
        vocabulary say that too."""
        value = self.get(key)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | np.integer):
            raise self.fail(key, f"must be an integer, not {value!r:.40}")
        return int(value) if 0 <= value < n_tokens else None

    def token_ids(self, key: str, n_tokens: int) -> list[int]:
        """A list of ids; Ollama's converter writes all that end an answer."""
        value = self.get(key)
        if value is None:
            return []
        if not isinstance(value, np.ndarray) or value.dtype.kind not in "iu":
            raise self.fail(key, f"must be a list of integers, not {value!r:.40}")
        return [i for i in value.tolist() if 0 <= i < n_tokens]

    def pre(self) -> str:
        """The pre-tokenizer's name, of a kind of model that is supported."""
        model, pre = self.get("model"), self.get("pre")
        if not isinstance(model, str) or model != "gpt2":
            reason = f"is {model!r:.40}; only 'gpt2' (byte-level BPE) is supported"
            raise self.fail("model", reason)
        pre = "default" if pre is None else pre
        if not isinstance(pre, str) or pre not in PRE_TOKENIZERS:
            raise self.fail("pre", f"is {pre!r:.40}; known: {', '.join(PRE_TOKENIZERS)}")
        return pre

    def pieces(self) -> list[str]:
        pieces = self.strings("tokens")
        if not pieces:
            raise self.fail("tokens", "is empty")
        ids = dict(zip(pieces, range(len(pieces)), strict=True))
        if len(ids) != len(pieces):
            i = next(i for i, piece in enumerate(pieces) if ids[piece] != i)
            raise self.fail("tokens", f"lists {pieces[i]!r:.40} twice ({i}, {ids[pieces[i]]})")
        return pieces

    def types(self, n_tokens: int) -> np.ndarray:
        listed = self.get("token_type")
        types = np.ones(n_tokens, dtype=np.int32) if listed is None else np.asarray(listed)
        if types.shape != (n_tokens,):
            raise self.fail("token_type", f"has {types.size} entries for {n_tokens} tokens")
        if types.dtype.kind not in "iu" or types.min() < 0 or types.max() > _LAST_TYPE:
            raise self.fail("token_type", f"must hold integers 0..{_LAST_TYPE}")
        return types

    def merges(self, pieces: Iterable[str]) -> list[tuple[str, str]]:
        """Pairs of tokens; one that names no token of the list can never apply and is left out."""
        merges: list[Any] = [tuple(merge.split(" ")) for merge in self.strings("merges")]
        for rank, merge in enumerate(merges):
            if len(merge) != 2:
                reason = f"entry {rank} is {' '.join(merge)!r:.60}, not two tokens"
                raise self.fail("merges", reason)
        known = set(pieces)
        return [m for m in merges if known.issuperset((*m, "".join(m)))]

    def add_bos(self, pre: str, bos_id: int | None) -> bool:
        add_bos = self.get("add_bos_token")
        if add_bos is None:
            return pre in _LLAMA3 and bos_id is not None
        if not isinstance(add_bos, bool | np.bool_):
            raise self.fail("add_bos_token", f"must be a bool, not {add_bos!r:.40}")
        if add_bos and bos_id is None:
            raise self.fail("add_bos_token", "is set but bos_token_id is missing")
        return bool(add_bos)
