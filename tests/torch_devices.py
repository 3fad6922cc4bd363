"""The parts under test that need torch: modules that import this are skipped without it, and fail
where the oracles are required."""

from importlib import import_module

from oracles.need import packages

packages("torch")
# Tiny matrices: a second thread would only be waited for, on a busy machine for milliseconds each.
import_module("torch").set_num_threads(1)

PlacedBackend = import_module("deskside.backends.placed").PlacedBackend
ExpertCache = import_module("deskside.backends.expert_cache").ExpertCache
expert_copies = import_module("deskside.backends.expert_copies")
Layout, Source = expert_copies.Layout, expert_copies.Source
stream_module = import_module("deskside.backends.stream")
StreamOptions = stream_module.StreamOptions
torch_device = import_module("deskside.backends.torch_device")
torch_ops = import_module("deskside.backends.torch_ops")
torch_quants = import_module("deskside.backends.torch_quants")
parse_devices, work_bytes = torch_device.parse_devices, torch_device.work_bytes
