"""Tiny random checkpoints of the Hugging Face implementations: the float32 truth for logits.

Every checkpoint is a pure function of its name: weights come from a NumPy generator, not from the
library's own initialisation, which leaves norms at one, gates flat and routers near their ties.
"""

from __future__ import annotations

import copy
import importlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

# Byte-level BPE over 256 bytes and 40 merges, then three control tokens.
N_MERGES = 40
SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
N_PLAIN = 256 + N_MERGES
N_TOKENS = N_PLAIN + len(SPECIALS)

QWEN35_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

_CORPUS = (
    "the router sends each token to a few experts and the shared expert sees them all, "
    "then the delta net carries its state on to the next token in the text. "
) * 4


def _qwen35(moe: bool, **shape: Any) -> transformers.PreTrainedConfig:
    rotary = shape.pop("rotary")
    shape["rope_parameters"] = {
        "rope_type": "default",
        "rope_theta": 1e7,
        "partial_rotary_factor": rotary / shape["head_dim"],
        # three position streams share the rotary pairs; text gives all three the same position
        "mrope_section": [rotary // 2 - 2 * (rotary // 6), rotary // 6, rotary // 6],
        "mrope_interleaved": True,
    }
    kind = transformers.Qwen3_5MoeTextConfig if moe else transformers.Qwen3_5TextConfig
    return kind(**shape)


def configs() -> dict[str, transformers.PreTrainedConfig]:
    """name -> config, all small enough for a forward pass of 1,000 tokens in about a second."""
    common: dict[str, Any] = {
        "max_position_embeddings": 2048,
        "bos_token_id": N_PLAIN,
        "pad_token_id": N_PLAIN,
        "eos_token_id": N_PLAIN + 2,
    }
    return {
        # the real model's ratios; the vocabulary is padded, as it is there
        "qwen35moe": _qwen35(
            moe=True,
            vocab_size=N_TOKENS + 21,
            hidden_size=128,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=64,
            rotary=16,
            linear_num_key_heads=2,
            linear_num_value_heads=4,
            linear_key_head_dim=128,
            linear_value_head_dim=128,
            moe_intermediate_size=64,
            shared_expert_intermediate_size=64,
            num_experts=16,
            num_experts_per_tok=4,
            **common,
        ),
        # nothing here is a power of two that a kernel could lean on
        "qwen35moe-odd": _qwen35(
            moe=True,
            vocab_size=N_TOKENS,
            hidden_size=160,
            num_hidden_layers=8,
            num_attention_heads=6,
            num_key_value_heads=2,
            head_dim=64,
            rotary=32,
            linear_num_key_heads=2,
            linear_num_value_heads=6,
            linear_key_head_dim=64,
            linear_value_head_dim=64,
            moe_intermediate_size=96,
            shared_expert_intermediate_size=32,
            num_experts=12,
            num_experts_per_tok=3,
            **common,
        ),
        "qwen35": _qwen35(
            moe=False,
            vocab_size=N_TOKENS,
            hidden_size=128,
            intermediate_size=192,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=1,
            head_dim=64,
            rotary=16,
            linear_num_key_heads=2,
            linear_num_value_heads=4,
            linear_key_head_dim=64,
            linear_value_head_dim=64,
            **common,
        ),
        "qwen3moe": transformers.Qwen3MoeConfig(
            vocab_size=N_TOKENS,
            hidden_size=128,
            intermediate_size=96,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=64,
            moe_intermediate_size=96,
            num_experts=16,
            num_experts_per_tok=4,
            norm_topk_prob=True,
            rope_parameters={"rope_type": "default", "rope_theta": 1e6},
            **common,
        ),
        "qwen3": transformers.Qwen3Config(
            vocab_size=N_TOKENS,
            hidden_size=128,
            intermediate_size=224,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=64,
            tie_word_embeddings=True,
            rope_parameters={"rope_type": "default", "rope_theta": 1e6},
            **common,
        ),
        "qwen2": transformers.Qwen2Config(
            vocab_size=N_TOKENS,
            hidden_size=192,
            intermediate_size=256,
            num_hidden_layers=3,
            num_attention_heads=6,
            num_key_value_heads=2,
            rope_parameters={"rope_type": "default", "rope_theta": 1e6},
            **common,
        ),
        "llama": transformers.LlamaConfig(
            vocab_size=N_TOKENS,
            hidden_size=192,
            intermediate_size=352,
            num_hidden_layers=3,
            num_attention_heads=6,
            num_key_value_heads=2,
            head_dim=32,
            rope_parameters={"rope_type": "default", "rope_theta": 1e4},
            **common,
        ),
        "llama-tied": transformers.LlamaConfig(
            vocab_size=N_TOKENS,
            hidden_size=128,
            intermediate_size=192,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=1,
            tie_word_embeddings=True,
            rope_parameters={"rope_type": "default", "rope_theta": 1e5},
            **common,
        ),
    }


_CLASSES = {
    "qwen3_5_moe_text": "Qwen3_5MoeForCausalLM",
    "qwen3_5_text": "Qwen3_5ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "llama": "LlamaForCausalLM",
}


def _fill(model: torch.nn.Module, seed: int, tied: bool) -> None:
    """Weights that keep activations near unit size and every gate, decay and router in its range.

    A matrix has std 1/sqrt(fan-in), so that a unit input stays unit. Routers get twice that (expert
    shares then differ as in a trained model), the head three times (a greedy choice is then rarely
    close). Decay rates A span 0.02..4 per step: memories from one token to a whole chunk.
    """
    rng = np.random.default_rng(seed)
    for name, weight in sorted(model.named_parameters()):
        shape = tuple(weight.shape)
        noise = rng.standard_normal(shape, dtype=np.float32)
        if name.endswith("A_log"):
            value = np.log(np.exp(rng.uniform(np.log(0.02), np.log(4.0), shape)))
        elif name.endswith((".bias", "dt_bias")):
            value = noise
        elif name.endswith("conv1d.weight"):
            value = 0.5 * noise
        elif "norm" in name:
            # zero-centred norms hold w of (1 + w): their own initialisation is zero
            value = float(weight.detach().mean().round()) + 0.2 * noise
        elif "embed_tokens" in name:
            # a tied head scores the last token's own embedding: small, or text repeats itself
            value = (0.05 if tied else 1.0) * noise
            value[N_PLAIN:] = 0.0
        else:
            gain = 3.0 if "lm_head" in name else 2.0 if name.endswith("mlp.gate.weight") else 1.0
            value = gain * noise / np.sqrt(shape[-1])
            if "lm_head" in name:
                # control and padding ids score zero: greedy text neither stops nor leaves the text
                value[N_PLAIN:] = 0.0
        with torch.no_grad():
            weight.copy_(torch.from_numpy(np.asarray(value, dtype=np.float32)))


def write_tokenizer(folder: Path) -> None:
    """tokenizer.json and tokenizer_config.json of a byte-level BPE with the qwen35 split."""
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN35_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tok.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=N_PLAIN,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tok.train_from_iterator([_CORPUS], trainer)
    tok.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in SPECIALS])
    if tok.get_vocab_size() != N_TOKENS:
        raise AssertionError(f"the toy tokenizer has {tok.get_vocab_size()} tokens")
    tok.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": SPECIALS[0],
        "pad_token": SPECIALS[0],
        "eos_token": SPECIALS[2],
        "add_bos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 2048,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")


def build(name: str, folder: Path) -> Path:
    """Writes checkpoint `name` (config, safetensors, tokenizer) into `folder`; returns it."""
    config = copy.deepcopy(configs()[name])
    config._attn_implementation = "eager"
    model = getattr(transformers, _CLASSES[config.model_type])(config).float().eval()
    tied = bool(config.tie_word_embeddings)
    _fill(model, seed=sum(name.encode()), tied=tied)
    model.tie_weights()
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return folder


@contextmanager
def _recurrent_delta_rule(model: torch.nn.Module) -> Iterator[None]:
    """Runs the delta rule token by token, as it is defined, instead of in chunks of 64."""
    module: Any = importlib.import_module(type(model).__module__)
    if not hasattr(module, "torch_chunk_gated_delta_rule"):
        yield
        return
    chunked = module.torch_chunk_gated_delta_rule
    module.torch_chunk_gated_delta_rule = module.torch_recurrent_gated_delta_rule
    try:
        yield
    finally:
        module.torch_chunk_gated_delta_rule = chunked


@dataclass(frozen=True)
class Greedy:
    """A prompt whose greedy continuation is well separated from every tie."""

    prompt: list[int]
    tokens: list[int]
    margin: float  # smallest (best - second logit) / std of that step's logits
    router_margin: float  # see HFModel.router_margins; inf without routers


class HFModel:
    """A checkpoint in float32, eager attention, one thread."""

    def __init__(self, folder: Path) -> None:
        torch.set_num_threads(1)
        self.model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        self.top_k: int = getattr(self.model.config, "num_experts_per_tok", 0)
        self._router_logits: list[torch.Tensor] = []
        for module in self.model.modules():
            if type(module).__name__.endswith("TopKRouter"):
                module.register_forward_hook(self._keep_router_logits)

    def _keep_router_logits(self, _module: Any, _inputs: Any, output: Any) -> None:
        self._router_logits.append(output[0])

    def _forward(self, ids: torch.Tensor, recurrent: bool, **kwargs: Any) -> Any:
        self._router_logits.clear()
        with torch.inference_mode():
            if not recurrent:
                return self.model(input_ids=ids, **kwargs)
            with _recurrent_delta_rule(self.model):
                return self.model(input_ids=ids, **kwargs)

    def _margins(self, rows: int) -> np.ndarray:
        """(rows,) smallest margin over the layers of the pass just made."""
        best = np.full(rows, np.inf)
        for logits in self._router_logits:
            ordered = torch.sort(logits.double(), dim=-1, descending=True).values
            gap = ordered[:, self.top_k - 1] - ordered[:, self.top_k]
            best = np.minimum(best, (gap / logits.double().std(dim=-1)).numpy())
        return best

    def logits(self, ids: Sequence[int], *, recurrent: bool = True) -> np.ndarray:
        """float32 (n_tokens, n_vocab) of a fresh sequence."""
        out = self._forward(torch.tensor([list(ids)]), recurrent, use_cache=False)
        result: np.ndarray = out.logits[0].float().numpy()
        return result

    def router_margins(self, ids: Sequence[int]) -> np.ndarray:
        """(n_tokens,): how far each token is from choosing other experts.

        The gap between the last chosen and the first unchosen router logit, over the standard
        deviation of that router's logits, smallest over the layers; inf without routers.
        """
        self._forward(torch.tensor([list(ids)]), True, use_cache=False)
        return self._margins(len(ids))

    def prompt(self, n: int, margin: float, seed: int = 0) -> list[int]:
        """n random tokens at which no router comes nearer to a tie than `margin`.

        Grows the prompt in pieces on a cached pass and redraws from the first near-tie on; what
        stands is not touched again, since the model is causal.
        """
        rng = np.random.default_rng(seed)
        ids: list[int] = []
        cache: Any = None
        while len(ids) < n:
            piece = rng.integers(0, N_PLAIN, min(50, n - len(ids))).tolist()
            trial = copy.deepcopy(cache)
            self._forward(torch.tensor([piece]), False, past_key_values=trial, use_cache=True)
            near = np.flatnonzero(self._margins(len(piece)) < margin)
            good = piece[: int(near[0])] if near.size else piece
            if not good:
                continue
            out = self._forward(torch.tensor([good]), False, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            ids += good
        return ids

    def greedy(self, prompts: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
        """prompts (B, T) -> tokens (B, n), and how clear each choice is (B, n).

        That is the best logit minus the second, over the standard deviation of the step's logits.
        """
        ids = torch.from_numpy(prompts)
        cache: Any = None
        step = ids
        tokens, margins = [], []
        for _ in range(n):
            out = self._forward(step, cache is None, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            last = out.logits[:, -1].double()
            best = last.topk(2, dim=-1)
            tokens.append(best.indices[:, :1])
            margins.append((best.values[:, 0] - best.values[:, 1]) / last.std(dim=-1))
            step = tokens[-1]
        return torch.cat(tokens, dim=1).numpy(), torch.stack(margins, dim=1).numpy()

    def separated_greedy(self, n: int, length: int = 24, tries: int = 24) -> Greedy:
        """Of `tries` random prompts, the one whose greedy text stays farthest from all ties."""
        prompts = np.random.default_rng(7).integers(0, N_PLAIN, (tries, length))
        tokens, margins = self.greedy(prompts, n)
        found = []
        for prompt, text, margin in zip(prompts, tokens, margins, strict=True):
            routers = self.router_margins([*prompt, *text[:-1]])
            found.append(
                Greedy(prompt.tolist(), text.tolist(), float(margin.min()), float(routers.min()))
            )
        # an error of one part in a router's logits reaches few of the model's; in its own, all
        return max(found, key=lambda g: min(g.margin / 4, g.router_margin))
