"""The options of an engine. The command line takes its defaults from here."""

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

# Context in tokens, unless the user sets one or the model has less.
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

# Names in error messages of fields whose flags are spelled differently.
FLAGS = {
    "ctx": "-c/ctx",
    "threads": "-t/threads",
    "threads_batch": "-tb/threads_batch",
    "batch": "-b/batch",
    "ubatch": "-ub/ubatch",
    "parallel": "-np/parallel",
}

Natural = Annotated[int, Meta(ge=0)]


@dataclass(frozen=True)
class EngineConfig:
    """Options of an engine, checked when they are made; DesksideError for a bad one.

    The command line generates its flags from these fields.

    ctx        context in tokens, at most the model's own; 0 = the model's own; None = 4096, or the
               model's own if that is less
    threads    0 or -1 = one per usable core
    threads_batch
               threads while a prompt is computed; 0 or -1 = as many as `threads`
    ubatch     most tokens that one step of prefill computes
    batch      a limit of `ubatch`, which becomes the smaller of the two; None = no limit
    parallel   most sequences at the same time, each with a context of `ctx` tokens
    ctk, ctv   types of the cached keys and values: f16, q8_0 or f32
    backend    cpu, or reference (NumPy, slow, for checking)
    isa        a compiled instruction set; None = the fastest that this CPU has
    numa       memory of the weights: "none" = where the kernel puts it; "interleave" = spread over
               all NUMA nodes
    huge_pages for the weights: "auto" (transparent), "off", or reserved ones of "2MiB" or "1GiB"

    These decide where tensors go (docs/PLANNER.md). They mean what they mean in llama.cpp.

    devices          GPUs to use, such as ["cuda0", "emu0:8GiB"] or "cuda0,emu0:8GiB"; "none" = no
                     GPU; None = all GPUs if one of the options below needs one, else none
    override_tensor  rules "REGEX=DEVICE"; the first rule that matches a tensor decides
    cpu_moe          put all routed experts on the CPU
    n_cpu_moe        put the routed experts of the first N layers on the CPU
    gpu_layers       put the last N layers on GPUs, the head counting as one; "all" or "auto"
    tensor_split     share of the layers that each GPU gets, such as "3,1"
    main_gpu         the GPU that gets the head, from 0
    margin           memory to leave free on every device, such as "1GiB"
    stream_experts   copy the CPU's experts to a GPU for prompts of at least this many tokens;
                     "auto" = the planner chooses that number and the batch size; "off" = never
    expert_cache     GPU memory for the CPU's most often chosen experts, such as "8GiB"
    no_mmap          read the embedding into memory instead of mapping the file
    mlock            as no_mmap, and keep all of the model in physical memory
    """

    ctx: Natural | None = None
    threads: Annotated[int, Meta(ge=-1)] = 0
    threads_batch: Annotated[int, Meta(ge=-1)] = 0
    ubatch: Annotated[int, Meta(ge=1)] = 512
    batch: Annotated[int, Meta(ge=1)] | None = None
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
        if self.batch is not None:
            object.__setattr__(self, "ubatch", min(self.ubatch, self.batch))
        check_options(self.huge_pages, self.numa)
        kv_type(self.ctk, "-ctk")
        kv_type(self.ctv, "-ctv")
        if self.backend not in ("cpu", "reference"):
            raise DesksideError(f"--backend {self.backend}: choose cpu or reference")

    def placement_options(self) -> dict[str, Any]:
        """The placement options that were given, as JSON values. Defaults are absent."""
        found = {name: getattr(self, name) for name in PLACING}
        found = {n: list(v) if isinstance(v, tuple) else v for n, v in found.items()}
        return {
            n: v
            for n, v in found.items()
            if v not in ([], "off") and v is not None and v is not False
        }

    @property
    def n_threads(self) -> int:
        """Threads to run: at most one a core, because more would wait for each other."""
        return min(self.threads, usable_cores()) if self.threads > 0 else usable_cores()

    @property
    def n_threads_batch(self) -> int:
        """The same while a prompt is computed."""
        return min(self.threads_batch, usable_cores()) if self.threads_batch > 0 else self.n_threads

    @property
    def notes(self) -> list[str]:
        """Lines for the user: what was asked for and is done otherwise."""
        cores = usable_cores()
        given = (("-t", self.threads), ("-tb", self.threads_batch))
        above = " and ".join(f"{flag} {n}" for flag, n in given if n > cores)
        if not above:
            return []
        return [
            f"{above}: this process may use {cores} cores, so {cores} threads run; more would only "
            "wait for each other"
        ]


def demo_model() -> Path:
    """The model file that comes with the package; DesksideError if it is missing."""
    path = Path(str(resources.files("deskside") / "data" / "demo.gguf"))
    if not path.exists():
        raise DesksideError("the bundled demo model is not installed; name a model with -m FILE")
    return path
