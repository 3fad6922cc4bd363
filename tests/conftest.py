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
def signals_end_processes() -> Iterator[None]:
    """Gives SIGINT and SIGHUP their default actions here and, since exec resets handlers, in
    processes that tests start. A shell's background job ignores the one, `nohup` the other."""
    interrupt = signal.signal(signal.SIGINT, signal.default_int_handler)
    hangup = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGINT, interrupt)
    signal.signal(signal.SIGHUP, hangup)
