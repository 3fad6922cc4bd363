from typing import Any

import numpy as np
from numpy.typing import NDArray

Place = tuple[int, int, int]

def instruction_sets() -> list[tuple[str, bool]]: ...
def choose(isa: str = "") -> str: ...
def read_bandwidth(n_threads: int, bytes: int, repeats: int) -> float: ...
def compute_limit(
    n_threads: int, isa: str = "", repeats: int = 5, floats: bool = False
) -> float: ...
def barrier_seconds(n_threads: int, seconds: float = 0.1) -> float: ...

class Reader:
    def __init__(
        self,
        bytes: int,
        n_threads: int,
        pages: str = "auto",
        nodes: list[int] = ...,
        cpus: list[int] = ...,
    ) -> None: ...
    @property
    def nodes_error(self) -> int: ...
    def read(self, n_threads: int, repeats: int, cpus: list[int] = ...) -> float: ...

PANEL_ROWS: int

def panel_bytes(type: int, cols: int) -> int: ...
def record_bytes(cols: int) -> int: ...

class Weights:
    def unpack(self, group: int, to: NDArray[np.uint8]) -> None: ...

class Arena:
    def __init__(
        self, bytes: int, pages: str = "auto", nodes: list[int] = ..., strict: bool = False
    ) -> None: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def nodes_error(self) -> int: ...
    def from_file(
        self,
        fd: int,
        offset: int,
        type: int,
        cols: int,
        rows: int,
        groups: int,
        at: int,
        stride: int,
        n_threads: int,
    ) -> Weights: ...
    def from_array(
        self,
        data: NDArray[np.uint8],
        type: int,
        cols: int,
        groups: int,
        at: int,
        stride: int,
        n_threads: int,
    ) -> Weights: ...

class Program:
    def __init__(
        self, n_threads: int, max_tokens: int, arena_floats: int, isa: str = ""
    ) -> None: ...
    @property
    def isa(self) -> str: ...
    @property
    def n_threads(self) -> int: ...
    @property
    def nbytes(self) -> int: ...
    def finish(self) -> None: ...
    def set_states(self, entries: list[tuple[Any, ...]]) -> None: ...
    def run(
        self,
        tokens: NDArray[np.int32],
        segments: NDArray[np.int32],
        outputs: NDArray[np.int32],
        logits: NDArray[np.float32],
        profile: bool = False,
        begin: int = 0,
        end: int = -1,
    ) -> list[float]: ...
    @property
    def activations(self) -> NDArray[np.float32]: ...
    def __getattr__(self, name: str) -> Any: ...
