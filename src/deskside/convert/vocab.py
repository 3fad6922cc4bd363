"""The `tokenizer.*` metadata of a GGUF file, from tokenizer.json and its companions."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np

from deskside.convert.checkpoint import read_json
from deskside.errors import DesksideError
from deskside.text.tokenizer import CONTROL, PRE_TOKENIZERS, UNUSED, USER_DEFINED

NORMAL = 1


def _spelling(regex: str) -> str:
    r"""One spelling for regexes that differ in brackets around a single class: [\p{L}] is \p{L}."""
    return re.sub(r"\[(\\p\{\w\})\]", r"\1", regex)


# A tokenizer.json writes the one-cut pre-tokenizers as a `Split` step with the same regex.
SPLIT_PATTERNS = {_spelling(cuts[0]): n for n, cuts in PRE_TOKENIZERS.items() if len(cuts) == 1}


def tokenizer_metadata(
    folder: Path, config: dict[str, Any], n_vocab: int, pre: str | None = None
) -> tuple[dict[str, Any], list[str]]:
    """`tokenizer.ggml.*` and chat templates for a byte-level BPE tokenizer; notes for the user.

    `n_vocab` is the number of rows of the embedding: ids without a token become `[PADn]`, unused.
    `pre` overrides the pre-tokenizer's name. Raises DesksideError for other kinds of tokenizer.
    """
    path = folder / "tokenizer.json"
    spec = read_json(path)
    settings = _optional_json(folder / "tokenizer_config.json")
    generation = _optional_json(folder / "generation_config.json")
    try:
        tokens, types, ids = _tokens(path, spec, n_vocab)
        metadata: dict[str, Any] = {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": pre or detect_pre(path, spec),
            "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.token_type": np.array(types, np.int32),
            "tokenizer.ggml.merges": [_merge(path, m) for m in spec["model"]["merges"]],
            "tokenizer.ggml.add_bos_token": _adds_bos(spec, settings),
        }
        "".join(metadata["tokenizer.ggml.tokens"] + metadata["tokenizer.ggml.merges"]).encode()
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise DesksideError(f"{path}: not a tokenizer that deskside can read ({error!r})") from None

    notes: list[str] = []
    for role, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        named = _named_id(role, ids, settings)
        told = [_told_ids(role, source) for source in (config, generation)]
        found = [i for i in [named, *told[0], *told[1]] if i is not None and 0 <= i < n_vocab]
        if found:
            metadata[f"tokenizer.ggml.{key}_token_id"] = found[0]
        if outside := [i for i in told[0] + told[1] if i >= n_vocab]:
            notes.append(f"{role}_token_id {outside[0]} is outside 0..{n_vocab - 1}: left out")
        if role == "eos":
            # A list is deliberate, and generation_config.json's is what Hugging Face stops at.
            more = told[1] + (told[0] if len(told[0]) > 1 else [])
            ends = list(dict.fromkeys(found[:1] + [i for i in more if i in found]))
            if len(ends) > 1:  # llama.cpp reads one more, Ollama and deskside the list
                metadata["tokenizer.ggml.eot_token_id"] = ends[1]
                metadata["tokenizer.ggml.eos_token_ids"] = np.array(ends, np.int32)
    templates, note = chat_templates(folder, settings)
    return metadata | templates, notes + ([note] if note else [])


def detect_pre(path: Path, spec: dict[str, Any]) -> str:
    """GGUF's name of tokenizer.json's pre-tokenizer; DesksideError shows an unknown regex."""
    steps = _flatten(spec.get("pre_tokenizer"), "pretokenizers")
    patterns = [s["pattern"].get("Regex") for s in steps if s["type"] == "Split"]
    byte_level = next((s for s in steps if s["type"] == "ByteLevel"), None)
    kinds = [s["type"] for s in steps]
    if byte_level is not None and byte_level.get("add_prefix_space"):
        raise DesksideError(f"{path}: ByteLevel with add_prefix_space is not supported")
    if kinds == ["Split", "ByteLevel"] and isinstance(patterns[0], str):
        name = SPLIT_PATTERNS.get(_spelling(patterns[0]))
        if name is not None:
            return name
    if byte_level is not None and byte_level.get("use_regex", True):
        if kinds == ["ByteLevel"]:
            return "gpt-2"
        if kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits"):
            return "smollm"
    shown = " then ".join(patterns) if all(patterns) and patterns else str(kinds)
    raise DesksideError(f"{path}: unknown pre-tokenizer {shown}; name one (option `pre`)")


def _tokens(
    path: Path, spec: dict[str, Any], n_vocab: int
) -> tuple[list[str], list[int], dict[str, int]]:
    """Token texts and types by id, and the ids by text."""
    model = spec["model"]
    if model.get("type", "BPE") != "BPE" or model.get("byte_fallback"):
        raise DesksideError(
            f"{path}: a {model.get('type')} tokenizer with byte fallback: "
            f"{bool(model.get('byte_fallback'))}; deskside converts byte-level BPE only"
        )
    kinds = {step["type"] for step in _flatten(spec.get("normalizer"), "normalizers")}
    if kinds - {"NFC"}:
        raise DesksideError(f"{path}: normalizer {', '.join(sorted(kinds))} is not supported")

    ids: dict[str, int] = dict(model["vocab"])
    typed = dict.fromkeys(ids, NORMAL)
    for added in spec.get("added_tokens", []):
        text = added["content"]
        ids[text] = added["id"]
        # Some checkpoints forget to mark `<|...|>` as special.
        special = added.get("special") or (text.startswith("<|") and text.endswith("|>"))
        typed[text] = CONTROL if special else USER_DEFINED

    tokens = [f"[PAD{i}]" for i in range(n_vocab)]
    types = [UNUSED] * n_vocab
    for text, i in ids.items():
        if type(i) is not int or not 0 <= i < n_vocab:
            raise DesksideError(
                f"{path}: token {text!r} has id {i}; the model's embedding has {n_vocab} rows"
            )
        if types[i] != UNUSED:
            raise DesksideError(f"{path}: id {i} is given to {tokens[i]!r} and to {text!r}")
        tokens[i], types[i] = text, typed[text]
    return tokens, types, ids


def _merge(path: Path, merge: str | list[str]) -> str:
    """`left right`: files hold merges as such a string, newer ones as a pair."""
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    if " " in left + right:
        raise DesksideError(f"{path}: merge {merge!r} contains a space; not a byte-level BPE")
    return f"{left} {right}"


def _flatten(step: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    if step is None:
        return []
    return list(step[key]) if step["type"] == "Sequence" else [step]


def _adds_bos(spec: dict[str, Any], settings: dict[str, Any]) -> bool:
    """Whether encoding starts with bos: tokenizer_config.json says, or else the post-processor."""
    if isinstance(explicit := settings.get("add_bos_token"), bool):
        return explicit
    for step in _flatten(spec.get("post_processor"), "processors"):
        if step["type"] == "TemplateProcessing" and len(step["single"]) > 1:
            return "SpecialToken" in step["single"][0]
    return False


def _named_id(role: str, ids: dict[str, int], settings: dict[str, Any]) -> int | None:
    """The id of tokenizer_config.json's token, which wins: config.json often keeps the base
    model's eos."""
    token = settings.get(f"{role}_token")
    text = token.get("content") if isinstance(token, dict) else token
    return ids.get(text) if isinstance(text, str) else None


def _told_ids(role: str, source: dict[str, Any]) -> list[int]:
    """An id or several of config.json or generation_config.json; -1 there means none."""
    value = source.get(f"{role}_token_id")
    return [i for i in (value if isinstance(value, list) else [value]) if type(i) is int]


def chat_templates(folder: Path, settings: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """`tokenizer.chat_template` and its named variants; a note where there is no default, else "".

    Hugging Face keeps them in five places. Of the default, the first of these counts:
    chat_template.jinja; chat_template.json (of a processor); tokenizer_config.json, one text or a
    list of {name, template}. additional_chat_templates/NAME.jinja has others.
    """
    found: dict[str, str] = {}
    told = settings.get("chat_template")
    if isinstance(told, str):
        found["default"] = told
    elif isinstance(told, list | dict):
        found |= _named_templates(told)
    processor = _optional_json(folder / "chat_template.json").get("chat_template")
    found |= {"default": processor} if isinstance(processor, str) else _named_templates(processor)
    for file in sorted((folder / "additional_chat_templates").glob("*.jinja")):
        found[file.stem] = _text(file)
    if (file := folder / "chat_template.jinja").is_file():
        found["default"] = _text(file)
    # A lone surrogate, legal in JSON, has no UTF-8 form.
    found = {name: text.encode(errors="replace").decode() for name, text in found.items() if text}
    note = ""
    if "default" not in found and found:
        name = next(iter(found))
        found["default"] = found.pop(name)
        note = f"no default chat template: took {name!r:.40}"
    if not found:
        note = "no chat template: chats with this file will use ChatML if it has those tokens"
    metadata: dict[str, Any] = {}
    if found:
        metadata["tokenizer.chat_template"] = found.pop("default")
    # Names as the `gguf` package writes them.
    named = {re.sub(r"[^a-z0-9_]", "_", name.lower()): text for name, text in found.items()}
    metadata |= {f"tokenizer.chat_template.{name}": text for name, text in named.items()}
    if named:
        metadata["tokenizer.chat_templates"] = list(named)
    return metadata, note


def _named_templates(told: Any) -> dict[str, str]:
    """Templates of a list of {name, template}, or of an object from name to template."""
    if isinstance(told, list):
        told = {t.get("name"): t.get("template") for t in told if isinstance(t, dict)}
    if not isinstance(told, dict):
        return {}
    return {n: t for n, t in told.items() if isinstance(n, str) and n and isinstance(t, str)}


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")


def _optional_json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}
