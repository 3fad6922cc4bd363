"""A tiny checkpoint with everything that a comparison needs, made once per test run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from deskside.convert.huggingface import convert_hf

if TYPE_CHECKING:
    from . import hf

# Every checkpoint of `hf.configs`, spelled out so that collecting tests does not import torch.
NAMES = (
    "qwen35moe", "qwen35moe-odd", "qwen35", "qwen3moe", "qwen3", "qwen2", "llama", "llama-tied",
)  # fmt: skip

# In units of a router's spread. An f16 KV cache moves hidden states by up to 3e-4 of theirs,
# float32 sums by 2e-6; nearer ties would let a right engine choose other experts.
ROUTER_MARGIN = 5e-4


@dataclass(frozen=True)
class Case:
    """`prompt` is 1,000 tokens far from router ties; a prefix of it has a prefix of `logits`."""

    name: str
    folder: Path
    gguf: Path
    prompt: list[int]
    logits: np.ndarray
    greedy: hf.Greedy

    @classmethod
    def make(cls, name: str, root: Path) -> Case:
        from . import hf

        folder = hf.build(name, root / name)
        gguf = root / f"{name}.gguf"
        convert_hf(folder, gguf, outtype="f32")
        model = hf.HFModel(folder)
        prompt = model.prompt(1000, ROUTER_MARGIN)
        greedy = model.separated_greedy(48)
        return cls(name, folder, gguf, prompt, model.logits(prompt), greedy)
