"""The parts under test that need torch: modules that import this are skipped without it, and fail
where the oracles are required."""

from importlib import import_module

from oracles.need import packages

packages("torch")
# Tiny matrices: a second thread would only be waited for, on a busy machine for milliseconds each.
import_module("torch").set_num_threads(1)

PlacedBackend = import_module("deskside.backends.placed").PlacedBackend
torch_device = import_module("deskside.backends.torch_device")
torch_ops = import_module("deskside.backends.torch_ops")
torch_quants = import_module("deskside.backends.torch_quants")
torch_graph = import_module("deskside.backends.torch_graph")
torch_record = import_module("deskside.backends.torch_record")
kernels = import_module("deskside.backends.kernels")
TorchDevice = torch_device.TorchDevice
parse_devices, work_bytes = torch_device.parse_devices, torch_device.work_bytes
