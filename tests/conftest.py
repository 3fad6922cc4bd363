"""Without a GPU, Triton's kernels run in its interpreter. It is chosen when they are imported, so
the variable is set before any test module is; in subprocesses that compile, it is taken away."""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")
# Matrices are tiny: a second thread would only be waited for.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
