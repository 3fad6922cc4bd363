"""Check an exported checkpoint and show what the model says.

Usage: python report.py CHECKPOINT [--transformers] [--temperature 0]
Prints parameter count and projected GGUF size, the largest logit difference to transformers (on
request) and answers to a few prompts.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from chat import END_OF_TEXT, TURN_END, TURN_START
from checkpoint import compare_with_transformers, gguf_bytes, load
from model import ModelConfig, Qwen35Moe
from tokenizers import Tokenizer

QUESTIONS = (
    "Hello, who are you?",
    "What does os.path.join do?",
    "What is the json module?",
    "How do I read a file in Python?",
    "What does textwrap.dedent do?",
    "Explain the with statement.",
    "What are the arguments of shutil.copyfile?",
    "Write a function that reverses a string.",
    "List the functions of module heapq.",
    "Thanks!",
)
COMPLETIONS = ("def read_file(path):\n", "import os\nimport sys\n\nclass ")


@torch.no_grad()
def generate(
    model: Qwen35Moe, tokenizer: Tokenizer, prompt: str, limit: int, temperature: float
) -> str:
    """Sample up to ``limit`` tokens, recomputing the whole sequence each time (no cache)."""
    ids: list[int] = tokenizer.encode(prompt).ids
    stop = {tokenizer.token_to_id(token) for token in (TURN_END, END_OF_TEXT)}
    length = len(ids)
    while len(ids) < length + limit:
        logits = model(torch.tensor([ids]))[0][0, -1].float()
        if temperature > 0:
            token = int(torch.multinomial((logits / temperature).softmax(-1), 1))
        else:
            token = int(logits.argmax())
        if token in stop:
            break
        ids.append(token)
    return str(tokenizer.decode(ids[length:], skip_special_tokens=False))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--transformers", action="store_true", help="compare logits (slow import)")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--limit", type=int, default=120, help="new tokens per sample")
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    cfg = ModelConfig(chunk_size=32, compute_dtype=torch.float32)
    model = load(args.checkpoint, cfg)
    tokenizer = Tokenizer.from_file(str(args.checkpoint / "tokenizer.json"))
    parameters = sum(weight.numel() for weight in model.parameters())
    print(f"{parameters} parameters, projected GGUF tensors {gguf_bytes(model) / 1e6:.3f} MB")
    if args.transformers:
        text = "\n".join(QUESTIONS + COMPLETIONS)
        tokens = torch.tensor([tokenizer.encode(text).ids])
        difference = compare_with_transformers(args.checkpoint, cfg, tokens)
        print(f"largest logit difference to transformers: {difference:.2e}")
    for question in QUESTIONS:
        prompt = f"{TURN_START}user\n{question}{TURN_END}\n{TURN_START}assistant\n"
        answer = generate(model, tokenizer, prompt, args.limit, args.temperature)
        print(f"\n> {question}\n{answer}")
    for start in COMPLETIONS:
        print(f"\n--- completion\n{start}{generate(model, tokenizer, start, 80, args.temperature)}")


if __name__ == "__main__":
    main()
