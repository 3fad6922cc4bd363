"""A small, complete byte-level vocabulary for files with random weights."""

from __future__ import annotations

import importlib
import inspect
import json
from collections.abc import Iterator
from importlib import resources
from typing import Any

import numpy as np
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

from deskside.convert.vocab import NORMAL
from deskside.errors import DesksideError
from deskside.text.tokenizer import CONTROL, PRE_TOKENIZERS, UNUSED, USER_DEFINED

_MODULES = ("argparse", "collections", "functools", "itertools", "json", "random", "statistics")
_CONTROL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
_USER_TOKENS = ["<think>", "</think>", "<tool_call>", "</tool_call>"]
_SPECIALS = _CONTROL_TOKENS + _USER_TOKENS
MAX_LEARNED = 2048  # bytes and merges


def toy_vocab(n_vocab: int, pre: str) -> dict[str, Any]:
    """`tokenizer.*` metadata for `n_vocab` tokens, cut by the pre-tokenizer `pre`.

    Ids: the 256 bytes and the learned merges, the special tokens, then unused `[PADn]`. Every text
    can be encoded; `<|im_end|>` is eos; the chat template is Qwen3.5's. The merges depend on the
    running Python's docstrings only. DesksideError if `n_vocab` cannot hold bytes and specials.
    """
    min_vocab = 256 + len(_SPECIALS)
    if n_vocab < min_vocab:
        raise DesksideError(
            f"a vocabulary of {n_vocab} is too small: 256 bytes and {len(_SPECIALS)} special "
            f"tokens need {min_vocab}"
        )
    learned, merges = _train(min(n_vocab - len(_SPECIALS), MAX_LEARNED), pre)
    tokens = learned + _SPECIALS
    unused = [f"[PAD{i}]" for i in range(len(tokens), n_vocab)]
    counts = (len(learned), len(_CONTROL_TOKENS), len(_USER_TOKENS), len(unused))
    end_of_text = tokens.index("<|endoftext|>")
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens + unused,
        "tokenizer.ggml.token_type": np.repeat(
            np.array([NORMAL, CONTROL, USER_DEFINED, UNUSED], np.int32), counts
        ),
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": end_of_text,
        "tokenizer.ggml.eos_token_id": tokens.index("<|im_end|>"),
        "tokenizer.ggml.padding_token_id": end_of_text,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": chat_template(),
    }


def chat_template() -> str:
    """Qwen3.5's own template."""
    data = resources.files("deskside").joinpath("data/qwen35-chat-template.jinja")
    return data.read_text("utf-8")


def _train(size: int, pre: str) -> tuple[list[str], list[str]]:
    """Up to `size` tokens by id, and the merges in order of rank."""
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    cuts = [pre_tokenizers.Split(Regex(cut), "isolated") for cut in PRE_TOKENIZERS[pre]]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*cuts, byte_level])
    trainer = trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=byte_level.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(_docstrings(), trainer)
    model = json.loads(tokenizer.to_str())["model"]
    return sorted(model["vocab"], key=model["vocab"].__getitem__), [
        f"{left} {right}" for left, right in model["merges"]
    ]


def _docstrings() -> Iterator[str]:
    for name in _MODULES:
        module = importlib.import_module(name)
        for member in (module, *(value for _, value in sorted(vars(module).items(), key=_name))):
            if isinstance(doc := inspect.getdoc(member), str):
                yield doc


def _name(item: tuple[str, object]) -> str:
    return item[0]
