"""How an engine is set up: the only source of the command line's defaults."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from deskside.errors import DesksideError
from deskside.machine.pages import check_options
from deskside.machine.system import usable_cores
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

_TEXTS, _OR_NONE = (str, list, tuple), (type(None),)
_KINDS: tuple[tuple[str, tuple[type, ...], str], ...] = (
    *((name, (str,), "text") for name in ("ctk", "ctv", "backend", "numa", "huge_pages")),
    ("isa", (str, *_OR_NONE), "a name or None"),
    ("devices", _TEXTS + _OR_NONE, "names such as cuda0 or emu0:8GiB"),
    ("override_tensor", _TEXTS, "rules such as exps=CPU"),
    ("cpu_moe", (bool,), "True or False"),
    ("n_cpu_moe", (int, *_OR_NONE), "a number of layers"),
    ("gpu_layers", (int, str, *_OR_NONE), "a number of layers, all or auto"),
    ("tensor_split", (str, *_OR_NONE), "shares such as 3,1"),
    ("main_gpu", (int, *_OR_NONE), "the number of a GPU"),
    ("margin", (str, *_OR_NONE), "a size such as 1GiB"),
    ("stream_experts", (int, str), "a number of tokens, auto or off"),
    ("expert_cache", (str, *_OR_NONE), "a size such as 8GiB"),
    ("no_mmap", (bool,), "True or False"),
    ("mlock", (bool,), "True or False"),
)


@dataclass(frozen=True)
class EngineConfig:
    """Validated once, here. Flags of the command line have the same names.

    ctx        context in tokens, at most the model's own; 0 for the model's own; None for 4096 or
               the model's own, whichever is less
    threads    0 for one per usable core
    ubatch     most tokens computed in one step of prefill
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

    ctx: int | None = None
    threads: int = 0
    ubatch: int = 512
    ctk: str = "f16"
    ctv: str = "f16"
    backend: str = "cpu"
    isa: str | None = None
    numa: str = "none"
    huge_pages: str = "auto"
    devices: str | Sequence[str] | None = None
    override_tensor: str | Sequence[str] = ()
    cpu_moe: bool = False
    n_cpu_moe: int | None = None
    gpu_layers: int | str | None = None
    tensor_split: str | None = None
    main_gpu: int | None = None
    margin: str | None = None
    stream_experts: int | str = "off"
    expert_cache: str | None = None
    no_mmap: bool = False
    mlock: bool = False

    def __post_init__(self) -> None:
        for flag, value, least in (
            ("-c/ctx", 0 if self.ctx is None else self.ctx, 0),
            ("-t/threads", self.threads, 0),
            ("-ub/ubatch", self.ubatch, 1),
        ):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise DesksideError(f"{flag} is {value!r}; expected a whole number >= {least}")
        for name, kinds, expected in _KINDS:
            value = getattr(self, name)
            whole = not isinstance(value, list | tuple) or all(isinstance(v, str) for v in value)
            wrong_bool = isinstance(value, bool) and bool not in kinds
            if not isinstance(value, kinds) or not whole or wrong_bool:
                raise DesksideError(f"{name} is {value!r}; expected {expected}")
        check_options(self.huge_pages, self.numa)
        kv_type(self.ctk, "-ctk")
        kv_type(self.ctv, "-ctv")
        if self.backend not in ("cpu", "reference"):
            raise DesksideError(f"--backend {self.backend}: there is cpu and reference")

    def placing(self) -> dict[str, Any]:
        """The options that say where tensors go, as far as they were given, fit for JSON."""
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
