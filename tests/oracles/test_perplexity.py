"""`deskside perplexity` against the same figure made of llama.cpp's logits.

The windows, bos and scored half are spelled out here once more, from llama.cpp's tool: chunk by
chunk of the text's tokens, logits of positions n_ctx / 2 to n_ctx - 2, each on the next token.

Tolerance: both engines round activations to 8 bits in blocks of their own choice, so a token's
log-probability differs at random by some d. Then mean(d) has a standard error of std(d) / sqrt(n),
which the test takes from the differences themselves, and may be four of those away from 0, plus
what a difference in the spread of the errors costs: log-probabilities are concave in the logits, so
noise costs KL on average, and neither engine's noise costs more than the divergence of the two.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest

from deskside import LLM
from deskside.bench.quality import perplexity as quality

from . import metrics, need, peers
from .fetch import SMOLLM2

DEMO = Path(str(files("deskside") / "data" / "demo.gguf"))
# Long, English and there wherever Python is.
TEXT = Path(sys.modules["subprocess"].__file__ or "")
CTX = 256
WINDOWS = 4


@pytest.mark.parametrize("name", ["demo", "SmolLM2"])
def test_same_perplexity_as_from_llama_cpps_logits(
    name: str, tmp_path: Path, report: Callable[..., None]
) -> None:
    path = DEMO if name == "demo" else need.member(SMOLLM2)
    text = TEXT.read_text(encoding="utf-8")
    llm = LLM(path, ctx=CTX, threads=2)
    windows = quality.windows(llm, text, TEXT.name, WINDOWS)
    ours = quality.perplexity(llm, windows, TEXT.name)

    first = CTX // 2
    theirs, mine, kl = [], [], []
    with peers.llama_cpp(path, n_ctx=CTX) as engine:
        ids = engine.tokenize(text)  # no file of the two asks for bos
        for i in range(WINDOWS):
            chunk = ids[i * CTX : (i + 1) * CTX]
            assert chunk == windows[i].tolist()
            logits = engine.logits(chunk)[first : CTX - 1]
            own = llm.logits(chunk)[first : CTX - 1]
            at = np.arange(len(logits)), chunk[first + 1 :]
            theirs.append(-metrics.log_softmax(logits)[at])
            mine.append(-metrics.log_softmax(own)[at])
            kl.append(metrics.kl(logits, own))
    want, d = np.concatenate(theirs), np.concatenate(mine) - np.concatenate(theirs)
    assert ours.scored == len(want)
    spread = np.sqrt(((want**2).mean() - want.mean() ** 2) / (len(want) - 1))

    difference = np.log(ours.ppl) - want.mean()
    tolerance = 4 * d.std(ddof=1) / np.sqrt(len(d)) + np.concatenate(kl).mean()
    report(
        "perplexity, deskside's and from llama.cpp's logits",
        file=path.name,
        tokens=ours.scored,
        deskside=ours.ppl,
        **{"llama.cpp": float(np.exp(want.mean())), "difference of logs": float(difference)},
        tolerance=float(tolerance),
    )
    assert tolerance < 0.03  # or the test would say nothing
    assert abs(difference) <= tolerance
    assert ours.error / ours.ppl == pytest.approx(spread, rel=0.02)
