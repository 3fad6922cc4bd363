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

PlacedBackend = import_module("deskside.backends.placed").PlacedBackend
ExpertCache = import_module("deskside.backends.expert_cache").ExpertCache
expert_copies = import_module("deskside.backends.expert_copies")
Layout, Source = expert_copies.Layout, expert_copies.Source
stream_module = import_module("deskside.backends.stream")
StreamOptions = stream_module.StreamOptions
torch_device = import_module("deskside.backends.torch_device")
torch_ops = import_module("deskside.backends.torch_ops")
torch_quants = import_module("deskside.backends.torch_quants")
torch_graph = import_module("deskside.backends.torch_graph")
torch_record = import_module("deskside.backends.torch_record")
kernels = import_module("deskside.backends.kernels")
TorchDevice = torch_device.TorchDevice


def parse_devices(text: str) -> list[Any]:
    """`emu0:1GiB,emu1:8MiB` to devices, all of whose memory may be used."""
    machine = choose_devices(this_machine(1), text.split(","), 0)
    return torch_device.open_devices(machine.gpus)
