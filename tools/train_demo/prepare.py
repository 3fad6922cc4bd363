"""Build everything training needs: corpus split, chat pairs, tokenizer and token arrays.

Usage: python prepare.py OUT_DIR [--tokenizer TOKENIZER_JSON]
Writes OUT_DIR/tokenizer/, OUT_DIR/<source>.npz (flat uint16 ``ids`` with document ``offsets``),
OUT_DIR/heldout.txt and OUT_DIR/heldout_chat.jsonl.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

import numpy as np
from api import from_live_objects, from_sources
from chat import (
    END_OF_TEXT,
    TURN_END,
    TURN_START,
    Pair,
    api_pairs,
    conversations,
    topic_pairs,
)
from corpus import SourceFile, is_held_out, language_topics, pieces, source_files
from persona import persona_pairs
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

VOCAB_SIZE = 4096
SPECIAL_TOKENS = (END_OF_TEXT, TURN_START, TURN_END)
HELD_OUT_BYTES = 300_000
# How often an epoch repeats a pair: what users are likely to ask first weighs most.
PERSONA_WEIGHT, POPULAR_WEIGHT, TOPIC_WEIGHT, OTHER_WEIGHT = 30, 5, 3, 1
# The pre-tokenizer expression of Qwen3.5's tokenizer.json.
QWEN35_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHAT_TEMPLATE = """\
{%- for message in messages %}
{%- if message.role not in ['system', 'user', 'assistant'] %}
{{- raise_exception('Unexpected message role: ' ~ message.role) }}
{%- endif %}
{{- '<|im_start|>' ~ message.role ~ '\\n' ~ message.content | trim ~ '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """Byte-level BPE with the special tokens last, as in Qwen's vocabularies."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN35_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - len(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    assert tokenizer.get_vocab_size() == VOCAB_SIZE
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(out / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": 8192,
        "clean_up_tokenization_spaces": False,
        "add_prefix_space": False,
        "bos_token": None,
        "eos_token": TURN_END,
        "pad_token": END_OF_TEXT,
        "unk_token": None,
        "chat_template": CHAT_TEMPLATE,
    }
    text = json.dumps(config, indent=2) + "\n"
    (out / "tokenizer_config.json").write_text(text, encoding="utf-8")


def collect_pairs(files: list[SourceFile], topics: dict[str, str]) -> list[Pair]:
    """All chat pairs, each question once."""
    pairs: dict[str, Pair] = {}
    for question, answer in persona_pairs():
        pairs[question] = Pair(question, answer, PERSONA_WEIGHT)
    for question, answer in topic_pairs(topics):
        pairs.setdefault(question, Pair(question, answer, TOPIC_WEIGHT))
    for source in (from_live_objects(), from_sources(files)):
        for api in source:
            weight = POPULAR_WEIGHT if api.popular else OTHER_WEIGHT
            for question, answer in api_pairs(api):
                pair = Pair(question, answer, weight)
                pairs.setdefault(question, pair)
    return list(pairs.values())


def save_tokens(path: Path, tokenizer: Tokenizer, documents: list[str]) -> int:
    encoded = [e.ids for e in tokenizer.encode_batch(documents)]
    offsets = np.cumsum([0, *map(len, encoded)])
    np.savez(path, ids=np.concatenate(encoded).astype(np.uint16), offsets=offsets)
    return int(offsets[-1])


def write_held_out(out: Path, files: list[SourceFile], pairs: list[Pair]) -> None:
    """Held-out files (tests last) up to the size limit, and held-out chat pairs."""
    text = ""
    for file in sorted(files, key=lambda file: file.is_test):
        if len(text) + len(file.text) <= HELD_OUT_BYTES:
            text += file.text.strip("\n") + "\n"
    (out / "heldout.txt").write_text(text, encoding="utf-8")
    with (out / "heldout_chat.jsonl").open("w", encoding="utf-8") as stream:
        for pair in pairs:
            line = {"question": pair.question, "answer": pair.answer}
            stream.write(json.dumps(line, ensure_ascii=False) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--tokenizer", type=Path, help="use this tokenizer.json, train none")
    args = parser.parse_args()
    out: Path = args.out
    out.mkdir(parents=True, exist_ok=True)
    rng = random.Random(0)

    everything = list(source_files())
    held_out = [file for file in everything if is_held_out(file.name)]
    files = [file for file in everything if not is_held_out(file.name)]
    topics = language_topics()
    pairs = collect_pairs(files, topics)
    is_test_pair = {
        pair: pair.weight != PERSONA_WEIGHT and is_held_out(pair.question) for pair in pairs
    }
    kept = [pair for pair, held in is_test_pair.items() if not held]
    write_held_out(out, held_out, [pair for pair, held in is_test_pair.items() if held])

    sources = {
        "library": [p for f in files if not f.is_test for p in pieces(f.text)],
        "tests": [p for f in files if f.is_test for p in pieces(f.text)],
        "topics": [piece for text in topics.values() for piece in pieces(text)],
        # Two differently shuffled passes, so that the grouping into conversations varies.
        "chat": [text for _ in range(2) for text in conversations(kept, rng)],
    }
    if args.tokenizer:
        tokenizer = Tokenizer.from_file(str(args.tokenizer))
    else:
        chat_sample = sources["chat"][: len(sources["chat"]) // 2]
        tokenizer = train_tokenizer(sources["library"] + sources["topics"] + chat_sample)
    save_tokenizer(tokenizer, out / "tokenizer")
    for name, documents in sources.items():
        if name != "chat":
            documents = [document + END_OF_TEXT for document in documents]
        total = save_tokens(out / f"{name}.npz", tokenizer, documents)
        size = sum(len(document.encode()) for document in documents)
        print(f"{name}: {len(documents)} documents, {size} bytes, {total} tokens")
    print(f"held out: {len(held_out)} files, {len(pairs) - len(kept)} of {len(pairs)} chat pairs")


if __name__ == "__main__":
    main()
