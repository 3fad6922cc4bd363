"""The parts under test that need torch; tests that import them are skipped without it."""

import pytest

torch = pytest.importorskip("torch")
# Tiny matrices: a second thread would only be waited for, on a busy machine for milliseconds each.
torch.set_num_threads(1)

from deskside.backends.placed import PlacedBackend
from deskside.backends.torch_device import parse_devices, work_bytes

__all__ = ["PlacedBackend", "parse_devices", "work_bytes"]
