"""How an engine is set up: the only source of the command line's defaults."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from deskside.cache import kv_type
from deskside.errors import DesksideError
from deskside.pages import check_options
from deskside.system import usable_cores

# Tokens, where neither the user nor a shorter model says otherwise.
DEFAULT_CTX = 4096


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

    def __post_init__(self) -> None:
        for flag, value, least in (
            ("-c/ctx", 0 if self.ctx is None else self.ctx, 0),
            ("-t/threads", self.threads, 0),
            ("-ub/ubatch", self.ubatch, 1),
        ):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise DesksideError(f"{flag} is {value!r}; expected a whole number >= {least}")
        for name in ("ctk", "ctv", "backend", "numa", "huge_pages"):
            if not isinstance(getattr(self, name), str):
                raise DesksideError(f"{name} is {getattr(self, name)!r}; expected text")
        if not isinstance(self.isa, str | None):
            raise DesksideError(f"isa is {self.isa!r}; expected a name or None")
        check_options(self.huge_pages, self.numa)
        kv_type(self.ctk, "-ctk")
        kv_type(self.ctv, "-ctv")
        if self.backend not in ("cpu", "reference"):
            raise DesksideError(f"--backend {self.backend}: there is cpu and reference")

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
