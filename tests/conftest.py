"""Without a GPU, Triton's kernels run in its interpreter. It is chosen when they are imported, so
the variable is set before any test module is; in subprocesses that compile, it is taken away."""

import os
import signal
from collections.abc import Iterator

import pytest

os.environ.setdefault("TRITON_INTERPRET", "1")
# Tests must mean the same on a machine with a GPU; `make gpu-check` runs what needs one.
if os.environ["TRITON_INTERPRET"] == "1":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
# Matrices are tiny: a second thread would only be waited for.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(autouse=True, scope="session")
def ctrl_c_works() -> Iterator[None]:
    """Gives SIGINT its default action here and, since exec resets handlers, in processes that tests
    start. A shell's background job and `nohup` begin with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
