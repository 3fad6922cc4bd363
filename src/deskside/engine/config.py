"""How an engine is set up: the only source of the command line's defaults."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Annotated, Any

from msgspec import Meta

from deskside.errors import DesksideError
from deskside.machine.pages import check_options
from deskside.machine.system import usable_cores
from deskside.schema import check_fields
from deskside.tape.cache import kv_type

# Tokens, where neither the user nor a shorter model says otherwise.
DEFAULT_CTX = 4096


# Options that decide where tensors go.
PLACING = (
    "devices",
    "override_tensor",
    "cpu_moe",
    "n_cpu_moe",
    "gpu_layers",
    "tensor_split",
    "main_gpu",
    "margin",
    "stream_experts",
    "expert_cache",
    "no_mmap",
    "mlock",
)

# What these are called on the command line.
FLAGS = {
    "ctx": "-c/ctx",
    "threads": "-t/threads",
    "ubatch": "-ub/ubatch",
    "parallel": "-np/parallel",
}

Natural = Annotated[int, Meta(ge=0)]


@dataclass(frozen=True)
class EngineConfig:
    """Validated once, here. Flags of the command line have the same names.

    ctx        context in tokens, at most the model's own; 0 for the model's own; None for 4096 or
               the model's own, whichever is less
    threads    0 for one per usable core
    ubatch     most tokens computed in one step of prefill
    parallel   sequences that live at once, each with a context of `ctx` tokens
    ctk, ctv   type of the cached keys and values: f16, q8_0 or f32
    backend    cpu, or reference (NumPy, slow, for checking)
    isa        a compiled instruction set; None for the fastest one here
    numa       memory of the weights: "none" (where the kernel puts it), or "interleave" (over all
               NUMA nodes in turn)
    huge_pages for the weights: "auto" (transparent ones), "off", or "2MiB", "1GiB" (reserved ones)

    Where tensors go (docs/PLANNER.md), with llama.cpp's meanings:

    devices          GPUs to use: ["cuda0", "emu0:8GiB"], or one text with commas; "none" for none;
                     None for all that the machine has where any of the following asks for one
    override_tensor  rules "REGEX=DEVICE"; the first that matches a tensor decides
    cpu_moe          all routed experts on the CPU; n_cpu_moe: those of the first so many layers
    gpu_layers       how many of the last layers on GPUs, the head as one more; "all" or "auto"
    tensor_split     the GPUs' shares of the layers, "3,1"; main_gpu: the one that takes the head
    margin           memory to leave free on every device, "1GiB"
    stream_experts   long prompts have the CPU's experts pass through a GPU: batches of at least so
                     many tokens; "auto" leaves that and the size of a batch to the planner, "off"
    expert_cache     memory of a GPU for experts of the CPU that are chosen often, "8GiB"
    no_mmap          the embedding is read into memory as well, not left in the mapped file
    mlock            the same, and nothing of it all may be swapped out
    """

    ctx: Natural | None = None
    threads: Natural = 0
    ubatch: Annotated[int, Meta(ge=1)] = 512
    parallel: Annotated[int, Meta(ge=1)] = 1
    ctk: str = "f16"
    ctv: str = "f16"
    backend: str = "cpu"
    isa: Annotated[str | None, Meta(description="a name or None")] = None
    numa: str = "none"
    huge_pages: str = "auto"
    devices: Annotated[
        str | Sequence[str] | None, Meta(description="names such as cuda0 or emu0:8GiB")
    ] = None
    override_tensor: Annotated[str | Sequence[str], Meta(description="rules such as exps=CPU")] = ()
    cpu_moe: bool = False
    n_cpu_moe: Annotated[int | None, Meta(description="a number of layers")] = None
    gpu_layers: Annotated[int | str | None, Meta(description="a number of layers, all or auto")] = (
        None
    )
    tensor_split: Annotated[str | None, Meta(description="shares such as 3,1")] = None
    main_gpu: Annotated[int | None, Meta(description="the number of a GPU")] = None
    margin: Annotated[str | None, Meta(description="a size such as 1GiB")] = None
    stream_experts: Annotated[int | str, Meta(description="a number of tokens, auto or off")] = (
        "off"
    )
    expert_cache: Annotated[str | None, Meta(description="a size such as 8GiB")] = None
    no_mmap: bool = False
    mlock: bool = False

    def __post_init__(self) -> None:
        check_fields(self, FLAGS)
        check_options(self.huge_pages, self.numa)
        kv_type(self.ctk, "-ctk")
        kv_type(self.ctv, "-ctv")
        if self.backend not in ("cpu", "reference"):
            raise DesksideError(f"--backend {self.backend}: choose cpu or reference")

    def placement_options(self) -> dict[str, Any]:
        """The options of placement that were given, as JSON values. Defaults are absent."""
        found = {name: getattr(self, name) for name in PLACING}
        found = {n: list(v) if isinstance(v, tuple) else v for n, v in found.items()}
        return {
            n: v
            for n, v in found.items()
            if v not in ([], "off") and v is not None and v is not False
        }

    @property
    def n_threads(self) -> int:
        """Threads to run: at most one a core, for more would only wait for each other."""
        return min(self.threads or usable_cores(), usable_cores())


def demo_model() -> Path:
    """The model that comes with the package."""
    path = Path(str(resources.files("deskside") / "data" / "demo.gguf"))
    if not path.exists():
        raise DesksideError("the bundled demo model is not installed; name a model with -m FILE")
    return path
