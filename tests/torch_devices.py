"""The parts under test that need torch: modules that import this are skipped without it, and fail
where the oracles are required."""

import contextlib
from collections.abc import Iterator
from importlib import import_module
from typing import Any

from deskside.machine.descriptions import this_machine
from deskside.machine.devices import choose_devices
from tests.oracles.need import packages

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
emulated = import_module("deskside.backends.torch.emulated")
torch_ops = import_module("deskside.backends.torch.ops")
torch_quants = import_module("deskside.backends.torch.quants")
torch_graph = import_module("deskside.backends.torch.graph")
torch_record = import_module("tests.torch_record")
kernels = import_module("deskside.backends.torch.kernels")


class FakeDevice(emulated.EmulatedDevice):  # type: ignore[misc, name-defined]
    """An emulated device that captures steps as recordings, where asked, and may be lost."""

    ops_until_loss: int | None = None

    def __init__(
        self, name: str, budget: int, *, kernels: Any = kernels.NONE, graphs: bool = False
    ) -> None:
        super().__init__(name, budget, kernels=kernels)
        self._capturing = graphs

    def _graph_maker(self) -> Any:
        return torch_record.Recordings(self.device, self.kernels)

    @contextlib.contextmanager
    def guard(self, doing: str) -> Iterator[None]:
        if doing.startswith(("computing", "replaying")):
            self._count_down()
        with super().guard(doing):
            yield

    def beat(self, doing: str) -> None:
        self._count_down()
        super().beat(doing)

    def _count_down(self) -> None:
        if self.ops_until_loss is not None:
            self.ops_until_loss -= 1
            self.lost: bool = self.lost or self.ops_until_loss < 0


def parse_devices(text: str) -> list[Any]:
    """`emu0:1GiB,emu1:8MiB` to devices, all of whose memory may be used."""
    machine = choose_devices(this_machine(1), text.split(","), 0)
    return [FakeDevice(d.name, d.memory) for d in machine.gpus]
