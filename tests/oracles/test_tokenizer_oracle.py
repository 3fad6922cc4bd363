"""Token ids against llama.cpp's own, for every pre-tokenizer, on SmolLM2's real vocabulary.

Of the model only the tokenizer is used: it is written, with one pre-tokenizer's name after
another, into a one-layer model of zeros that llama.cpp opens.
"""

# ruff: noqa: RUF001 (characters that look alike are what is tested)

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deskside.text.tokenizer import PRE_TOKENIZERS, Tokenizer

from . import need, peers
from .fetch import SMOLLM2

TEXTS = [
    "Hello  world\n\n123 it's   we'LL\tdon't I'd 'tis ''s",
    "def f(x):\r\n    return x ** 2  # 2.5e-10\r\n\r\n\n \n  \n",
    "   leading and trailing   ",
    "1234567 12 3.14159 ٣٤٥ ⅷ ½ 一二三",
    "naïve café cafe\u0301 Ångström नमस्ते สวัสดีครับ ผมชื่ออเล็กซ์ 안녕하세요",
    "你好，世界！今天是2026年8月13日 🎉👩‍👩‍👧‍👦 «quoted» — “dash”…",
    "a$b+c<d=e>f^g~h|i !!! ??? (){}[] ... --- ___ a_b `x` \\n",
    "\u00a0nbsp\u2003em\u3000wide\u2028line\u0085nel\x0bvt\x0cff\x00nul",
    "<|im_start|>user\nhi<|im_end|>\n<|endoftext|><|im_end|> <|im_start",
    "ſ ß ﬀ Ǆ İ ı ΐ ᾳ \u0301\u0301x \u200d\ufeff",
    "",
]


@pytest.fixture(scope="module")
def metadata() -> dict[str, Any]:
    need.packages("gguf")
    import gguf

    fields = gguf.GGUFReader(need.member(SMOLLM2)).fields
    values = {k: f.contents() for k, f in fields.items() if k.startswith("tokenizer.ggml.")}
    numeric = values["tokenizer.ggml.token_type"]
    return values | {"tokenizer.ggml.token_type": np.array(numeric, dtype=np.int32)}


def write_model(path: Path, metadata: dict[str, Any], pre: str) -> None:
    """A llama of one layer, width 32, all zeros, with this tokenizer."""
    import gguf

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(32)
    writer.add_head_count(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(metadata["tokenizer.ggml.tokens"])
    writer.add_token_types(metadata["tokenizer.ggml.token_type"].tolist())
    writer.add_token_merges(metadata["tokenizer.ggml.merges"])
    writer.add_bos_token_id(int(metadata["tokenizer.ggml.bos_token_id"]))
    writer.add_eos_token_id(int(metadata["tokenizer.ggml.eos_token_id"]))
    square = np.zeros((32, 32), dtype=np.float32)
    for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"):
        writer.add_tensor(f"blk.0.{name}.weight", square)
    for name in ("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm"):
        writer.add_tensor(f"{name}.weight", square[0])
    n_vocab = len(metadata["tokenizer.ggml.tokens"])
    writer.add_tensor("token_embd.weight", np.zeros((n_vocab, 32), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def random_texts(count: int) -> Iterator[str]:
    """Strings over characters that the cuts treat differently, from all of Unicode's classes."""
    rng = random.Random(7)
    special = (
        "  \n\n\r\t'''sStTrRevVmMlLdD1234.,-+$<>|~^_()!ab\u0301\u0e31\u0e14é中🎉\u00a0\u3000²٣"
    )
    for _ in range(count):
        yield "".join(rng.choice(special) for _ in range(rng.randrange(1, 60)))


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_ids_equal_llama_cpp(pre: str, metadata: dict[str, Any], tmp_path: Path) -> None:
    model = tmp_path / "model.gguf"
    write_model(model, metadata, pre)
    ours = Tokenizer.from_metadata(metadata | {"tokenizer.ggml.pre": pre}, model.name)
    with peers.llama_cpp(model, n_ctx=64) as theirs:
        for text in [*TEXTS, *random_texts(300)]:
            expected = theirs.tokenize(text)
            assert ours.encode(text, add_bos=False) == expected, repr(text)
            if "<|" not in text:
                assert ours.encode(text, add_bos=False, special=False) == expected, repr(text)
