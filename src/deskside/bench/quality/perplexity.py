"""Measures how well a model predicts a text, and how far it is from a reference run.

The text is cut and scored as in llama.cpp's perplexity tool, so that results can be compared:

- Tokenize the whole text, control tokens as plain text, bos first if the file says so.
- Cut it into windows of `ctx` tokens. Leave out the rest.
- Compute each window as a new sequence. Replace its first token by bos if the file says so.
- Score positions ctx // 2 to ctx - 2, each on the token that follows it.

So a window has ctx - 1 - ctx // 2 predictions, each with at least ctx // 2 tokens before it.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deskside.bench.quality.logprobs import Header, LogProbs, LogProbWriter
from deskside.engine import LLM
from deskside.errors import DesksideError
from deskside.files import sha256
from deskside.progress import Progress, silent

WINDOW = 512  # tokens, as in llama.cpp's tool
MIN_CTX = 8
# Bytes of logits to compute at once, and elements to process at once in float64. For a vocabulary
# of 248,320 these are 135 rows and 16 rows.
LOGITS_BYTES = 128 << 20
BLOCK = 1 << 22

Doubles = NDArray[np.float64]
Ints = NDArray[np.int32]


@dataclass(frozen=True)
class Divergence:
    """This run Q compared with a reference run P, over the scored positions.

    Errors are standard errors that assume independent positions.

    mean .. maximum  of KL(P || Q), in nats
    top1             share of positions with the same most likely token
    dp_mean, dp_rms  mean and root mean square of q - p, the probabilities of the text's token
    ppl_ratio        perplexity of Q over that of P; its error uses the pairing
    """

    reference: str
    mean: float
    mean_error: float
    median: float
    p95: float
    p99: float
    maximum: float
    top1: float
    top1_error: float
    dp_mean: float
    dp_mean_error: float
    dp_rms: float
    ppl_reference: float
    ppl_ratio: float
    ppl_ratio_error: float


@dataclass(frozen=True)
class Perplexity:
    """The perplexity of a text.

    ppl: exp of the mean of -log p over `scored` predictions.
    error: standard error of ppl by the delta method: ppl times the error of the mean.
    rate: computed tokens per second.
    """

    text: str
    model: str
    ctx: int
    windows: int
    scored: int
    ppl: float
    error: float
    seconds: float
    rate: float
    settings: dict[str, Any]
    divergence: Divergence | None = None


def windows(llm: LLM, text: str, name: str, chunks: int | None = None) -> Ints:
    """Cut a text into windows, int32 (n, llm.ctx), at most `chunks` of them.

    name: of the text, for errors. DesksideError if the text or the context is too short.
    """
    if llm.ctx < MIN_CTX:
        raise DesksideError(f"-c {llm.ctx} leaves too little to score; use at least {MIN_CTX}")
    if chunks is not None and chunks < 1:
        raise DesksideError(f"--chunks {chunks}: expected at least 1")
    if not text.strip():
        raise DesksideError(f"{name} is empty: there is nothing to score")
    ids = np.array(llm.tokenize(text, special=False), np.int32)
    n = len(ids) // llm.ctx
    if n == 0:
        raise DesksideError(
            f"{name} has {len(ids)} tokens, less than one window of {llm.ctx}; "
            "give more text or lower -c"
        )
    n = n if chunks is None else min(n, chunks)
    found = ids[: n * llm.ctx].reshape(n, llm.ctx)
    bos = llm.tokenizer.bos_id
    if llm.tokenizer.add_bos and bos is not None:
        found[:, 0] = bos
    return found


def log_softmax(logits: NDArray[np.float32]) -> Doubles:
    """Log-probabilities (n, n_vocab) in float64."""
    x = logits.astype(np.float64)
    x -= x.max(axis=1, keepdims=True)
    x -= np.log(np.exp(x).sum(axis=1, keepdims=True))
    return x


def perplexity(
    llm: LLM,
    windows: Ints,
    name: str,
    *,
    writer: LogProbWriter | None = None,
    reference: LogProbs | None = None,
    progress: Progress = silent,
) -> Perplexity:
    """Score the windows (n, llm.ctx) of the text `name`.

    writer: gets the log-probabilities. reference: a run to compare with; DesksideError if it has
    another vocabulary or other tokens. progress: its label shows the perplexity so far.
    """
    if reference is not None:
        _check(reference, llm, windows)
    n, ctx = windows.shape
    per_window = ctx - 1 - ctx // 2
    nll = np.empty(n * per_window)
    compared = None if reference is None else _Compared(reference, len(nll))
    started, at = time.perf_counter(), 0
    progress("perplexity", 0, len(nll))
    for logp, targets in _predictions(llm, windows):
        rows = slice(at, at + len(logp))
        nll[rows] = -logp[np.arange(len(logp)), targets]
        if not np.isfinite(nll[rows]).all():
            raise DesksideError(
                f"{llm.file.path}: window {at // per_window + 1} of {name}: the probability of a "
                "token is 0 or not a number; the model's weights may be damaged"
            )
        if writer is not None:
            writer.write(logp, targets)
        if compared is not None:
            compared.add(rows, logp)
        at = rows.stop
        progress(f"PPL {np.exp(nll[:at].mean()):.4f}", at, len(nll))
    seconds = time.perf_counter() - started
    return Perplexity(
        text=name,
        model=str(llm.file.path),
        ctx=ctx,
        windows=n,
        scored=len(nll),
        ppl=float(np.exp(nll.mean())),
        error=float(np.exp(nll.mean())) * _error(nll),
        seconds=seconds,
        rate=n * (ctx - 1) / seconds,
        settings=settings(llm),
        divergence=None if compared is None else compared.result(nll),
    )


def _predictions(llm: LLM, windows: Ints) -> Iterator[tuple[Doubles, Ints]]:
    """Yield blocks of log-probabilities (n, n_vocab) and of the tokens (n,) that follow."""
    first = windows.shape[1] // 2
    rows = max(1, LOGITS_BYTES // (4 * llm.tape.n_vocab))
    block = max(1, BLOCK // llm.tape.n_vocab)
    for window in windows:
        at = first + 1
        for logits in llm.logits_from(window[:-1].tolist(), first, rows):
            for i in range(0, len(logits), block):
                logp = log_softmax(logits[i : i + block])
                yield logp, window[at : at + len(logp)]
                at += len(logp)


class _Compared:
    """Collects the differences between a reference and this run, position by position."""

    def __init__(self, reference: LogProbs, n: int) -> None:
        self._reference = reference
        self._kl = np.empty(n)
        self._same = np.empty(n, np.bool_)

    def add(self, rows: slice, logq: Doubles) -> None:
        logp = self._reference.log_probs(rows.start, rows.stop)
        # Tiny negative sums are rounding errors; a divergence is never negative.
        self._kl[rows] = np.maximum((np.exp(logp) * (logp - logq)).sum(axis=1), 0)
        self._same[rows] = logq.argmax(axis=1) == self._reference.rows["top"][rows]

    def result(self, nll: Doubles) -> Divergence:
        kl, same = self._kl, self._same.astype(np.float64)
        theirs = self._reference.rows["nll"][: len(nll)].astype(np.float64)
        dp = np.exp(-nll) - np.exp(-theirs)
        ratio = float(np.exp((nll - theirs).mean()))
        median, p95, p99 = np.percentile(kl, (50, 95, 99))
        return Divergence(
            reference=str(self._reference.path),
            mean=float(kl.mean()),
            mean_error=_error(kl),
            median=float(median),
            p95=float(p95),
            p99=float(p99),
            maximum=float(kl.max()),
            top1=float(same.mean()),
            top1_error=_error(same),
            dp_mean=float(dp.mean()),
            dp_mean_error=_error(dp),
            dp_rms=float(np.sqrt((dp**2).mean())),
            ppl_reference=float(np.exp(theirs.mean())),
            ppl_ratio=ratio,
            ppl_ratio_error=ratio * _error(nll - theirs),
        )


def _error(x: Doubles) -> float:
    """Standard error of a mean."""
    return float(x.std(ddof=1) / np.sqrt(len(x)))


def settings(llm: LLM) -> dict[str, Any]:
    """The options of the engine that change the result."""
    return {
        "ctk": llm.config.ctk,
        "ctv": llm.config.ctv,
        "ubatch": llm.ubatch,
        "backend": llm.config.backend,
        "isa": getattr(llm.backend, "isa", None),
    }


def header(llm: LLM, windows: Ints, name: str, version: str, progress: Progress = silent) -> Header:
    """The header of a file with the log-probabilities of this run."""
    n, ctx = windows.shape
    return Header(
        model=llm.file.path.name,
        sha256=sha256(llm.file.paths, "hashing the model", progress),
        vocabulary=_vocabulary(llm),
        n_vocab=llm.tape.n_vocab,
        ctx=ctx,
        windows=n,
        first=ctx // 2,
        text=name,
        deskside=version,
        settings=settings(llm),
    )


def _vocabulary(llm: LLM) -> str:
    return hashlib.sha256("\0".join(llm.tokenizer.pieces).encode()).hexdigest()


def _check(reference: LogProbs, llm: LLM, windows: Ints) -> None:
    """DesksideError if the reference has another vocabulary or does not begin with the windows."""
    was, path = reference.header, reference.path
    if was.n_vocab != llm.tape.n_vocab or was.vocabulary != _vocabulary(llm):
        raise DesksideError(
            f"{path}: its model, {was.model}, has another vocabulary ({was.n_vocab} tokens) than "
            f"{llm.file.path} ({llm.tape.n_vocab} tokens); divergence needs the same one"
        )
    n, ctx = windows.shape
    if was.ctx != ctx or was.first != ctx // 2:
        raise DesksideError(f"{path}: has windows of {was.ctx} tokens, not {ctx}: use -c {was.ctx}")
    if was.windows < n:
        raise DesksideError(
            f"{path}: has {was.windows} windows, fewer than the {n} of this text: "
            f"use --chunks {was.windows}"
        )
    differing = np.flatnonzero((reference.tokens[:n] != windows).any(axis=1))
    if len(differing):
        raise DesksideError(
            f"{path}: was made with other text ({was.text}): window {differing[0] + 1} has other "
            "tokens"
        )


def read_text(path: Path | None, stdin: bytes = b"") -> tuple[str, str]:
    """Read a text. Returns it and its name. DesksideError if it is not UTF-8.

    path: None = take the bytes of `stdin`.
    """
    name = "stdin" if path is None else str(path)
    try:
        return (stdin if path is None else path.read_bytes()).decode("utf-8"), name
    except UnicodeDecodeError as error:
        raise DesksideError(
            f"{name} is not UTF-8 at byte {error.start}; convert it first (iconv -t utf-8)"
        ) from None
    except OSError as error:
        raise DesksideError(f"{name}: cannot be read: {error.strerror}") from None
