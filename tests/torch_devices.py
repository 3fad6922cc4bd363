"""The parts under test that need torch: modules that import this are skipped without it, and fail
where the oracles are required."""

from importlib import import_module
from typing import Any

from deskside.machine.descriptions import this_machine
from deskside.machine.devices import choose_devices
from oracles.need import packages

packages("torch")
# Tiny matrices: a second thread would only be waited for, on a busy machine for milliseconds each.
import_module("torch").set_num_threads(1)

placed_module = import_module("deskside.backends.placed")
PlacedBackend = placed_module.PlacedBackend
ExpertCache = import_module("deskside.backends.experts.resident").ExpertCache
expert_copies = import_module("deskside.backends.experts.copies")
Layout, Source = expert_copies.Layout, expert_copies.Source
stream_module = import_module("deskside.backends.experts.stream")
StreamOptions = stream_module.StreamOptions
torch_device = import_module("deskside.backends.torch.device")
torch_ops = import_module("deskside.backends.torch.ops")
torch_quants = import_module("deskside.backends.torch.quants")
torch_graph = import_module("deskside.backends.torch.graph")
torch_record = import_module("deskside.backends.torch.record")
kernels = import_module("deskside.backends.torch.kernels")
TorchDevice = torch_device.TorchDevice


def parse_devices(text: str) -> list[Any]:
    """`emu0:1GiB,emu1:8MiB` to devices, all of whose memory may be used."""
    machine = choose_devices(this_machine(1), text.split(","), 0)
    return placed_module.open_devices(machine.gpus)
