"""How far two engines are apart. All take float logits of shape (n_tokens, n_vocab)."""

from __future__ import annotations

import numpy as np


def relative_l2(got: np.ndarray, want: np.ndarray) -> float:
    """||got - want|| / ||want|| over all tokens."""
    want = want.astype(np.float64)
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def per_token(got: np.ndarray, want: np.ndarray) -> np.ndarray:
    """(n_tokens,) relative L2 of each token's logits."""
    want = want.astype(np.float64)
    error: np.ndarray = np.linalg.norm(got - want, axis=1) / np.linalg.norm(want, axis=1)
    return error


def describe(got: np.ndarray, want: np.ndarray) -> str:
    """Where the error sits, for the message of a failed assertion."""
    errors = per_token(got, want)
    worst = int(errors.argmax())
    return (
        f"relative L2 {relative_l2(got, want):.2e}; per token median {np.median(errors):.2e}, "
        f"first {errors[0]:.2e}, worst {errors[worst]:.2e} at token {worst} of {len(errors)}"
    )


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Natural-log probabilities in float64."""
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    result: np.ndarray = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return result


def kl(p_logits: np.ndarray, q_logits: np.ndarray) -> np.ndarray:
    """(n_tokens,) Kullback-Leibler divergence KL(p || q) in nats."""
    p, q = log_softmax(p_logits), log_softmax(q_logits)
    result: np.ndarray = (np.exp(p) * (p - q)).sum(axis=1)
    return result


def top1(a: np.ndarray, b: np.ndarray) -> float:
    """Share of tokens whose most likely next token is the same."""
    return float((a.argmax(axis=1) == b.argmax(axis=1)).mean())
