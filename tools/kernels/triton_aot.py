"""Compiles the Triton kernels for GPUs that need not be present, and inspects the machine code.

Triton and its own ptxas compile every kernel for each target, at the shapes of Qwen3.5-397B. The
machine code gives registers, bytes of stack, shared memory, and the length of the main loop. The
stack holds only spilled registers and a thread's arrays. Triton caches results on disk, keyed by
source, shape and target.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from deskside.backends.triton.decode import PAIR

MATVEC_POINTERS = {
    "x_ptr": "*fp32", "w_ptr": "*u8", "up_ptr": "*u8", "expert_ptr": "*i32", "y_ptr": "*fp32",
    "n_experts": "i32",
}  # fmt: skip
MATMUL_POINTERS = {
    "x_ptr": "*fp16", "scale_ptr": "*fp32", "w_ptr": "*u8", "up_ptr": "*u8", "tile_ptr": "*i32",
    "order_ptr": "*i32", "y_ptr": "*fp32",
}  # fmt: skip
SIZES = {"n_rows": "i32", "n_out": "i32"}
DELTA = {
    "qkv_ptr": "*fp32", "a_ptr": "*fp32", "b_ptr": "*fp32", "ssm_a_ptr": "*fp32",
    "dt_bias_ptr": "*fp32", "slot_ptr": "*i32", "state_ptr": "*fp32", "out_ptr": "*fp32",
    "k_heads": "i32", "v_heads": "i32", "eps": "fp32",
}  # fmt: skip
ATTEND = {
    "q_ptr": "*fp32", "k_ptr": "*u8", "v_ptr": "*u8", "slot_ptr": "*i32", "length_ptr": "*i32",
    "part_ptr": "*fp32", "stats_ptr": "*fp32", "kv_heads": "i32", "n_ctx": "i32", "scale": "fp32",
}  # fmt: skip
MERGE = {"part_ptr": "*fp32", "stats_ptr": "*fp32", "out_ptr": "*fp32", "splits": "i32"}


@dataclass(frozen=True)
class Target:
    """The resources of a streaming multiprocessor, from NVIDIA's table of compute capabilities."""

    name: str
    arch: int
    threads: int
    ctas: int
    registers: int
    shared: int  # bytes, of which a CTA also takes `reserved`
    reserved: int = 1024


TARGETS = (
    Target("sm_90", 90, threads=2048, ctas=32, registers=65536, shared=228 << 10),
    Target("sm_120", 120, threads=1536, ctas=24, registers=65536, shared=100 << 10),
)


@dataclass(frozen=True)
class Variant:
    """One kernel at one shape. `kernel` names a function of `module` in backends/triton."""

    name: str
    module: str
    kernel: str
    pointers: dict[str, str]
    constants: dict[str, Any]
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class Compiled:
    """The resources that one variant needs on one target. Sizes are bytes."""

    name: str
    target: str
    registers: int
    stack: int
    shared: int
    warps: int
    occupancy: float  # of the multiprocessor's threads
    limit: str  # the resource that allows no more CTAs
    traffic: int  # of weights, state or cache that a CTA reads and writes
    per_weight: float | None  # instructions of the main loop, in threads, a weight of the tile


def variants() -> list[Variant]:
    """Every kernel, at the tiles and shapes of Qwen3.5-397B."""
    from deskside.backends.triton import launch as tk

    def make(name: str, kernel: str, pointers: dict[str, str], config: tk.Config) -> Variant:
        module = "matmul" if kernel.startswith("mat") else "sequence"
        return Variant(
            name, module, kernel, pointers, config.constants, config.num_warps, config.num_stages
        )

    found = []
    for t in PAIR:
        few = tk.matvec_config(t, 4096, 1, fused=False)
        found.append(make(f"{t} 1 row", "matvec", MATVEC_POINTERS | SIZES, few))
        many = tk.matmul_config(t, 4096, 512, fused=False)
        pointers = MATMUL_POINTERS | SIZES
        if many.constants["PRECISION"] != "f16":
            pointers = pointers | {"x_ptr": "*fp32"}
        found.append(make(f"{t} 64-row tiles", "matmul", pointers, many))
    for t in ("F32", "Q8_0", "IQ4_NL", "IQ4_KSS"):
        pointers = MATMUL_POINTERS | SIZES | ({"x_ptr": "*fp32"} if t == "F32" else {})
        few = tk.matmul_config(t, 4096, 8, fused=False)
        found.append(make(f"{t} 3 to 16 rows", "matmul", pointers, few))
        if t != "F32":
            few = tk.matvec_config(t, 4096, 2, fused=False)
            found.append(make(f"{t} 2 rows", "matvec", MATVEC_POINTERS | SIZES, few))
    for t in ("IQ4_NL", "IQ4_XS", "IQ4_KSS"):
        both = tk.matvec_config(t, 4096, 1, share=10, grouped=True, fused=True)
        found.append(make(f"{t} experts gate+up, 1 row", "matvec", MATVEC_POINTERS | SIZES, both))
        for mean in (16, 64):
            both = tk.matmul_config(t, 4096, mean, share=10, grouped=True, fused=True)
            name = f"{t} experts gate+up, {mean}-row tiles"
            found.append(make(name, "matmul", MATMUL_POINTERS | SIZES, both))
    for t in ("IQ4_NL", "IQ4_KS"):
        down = tk.matvec_config(t, 1024, 1, grouped=True, fused=False)
        found.append(make(f"{t} experts down, 1 row", "matvec", MATVEC_POINTERS | SIZES, down))
        down = tk.matmul_config(t, 1024, 16, grouped=True, fused=False)
        name = f"{t} experts down, 16-row tiles"
        found.append(make(name, "matmul", MATMUL_POINTERS | SIZES, down))
    found.append(make("gated delta net step", "delta_step", DELTA, tk.delta_config(128)))
    for kv in ("f16", "q8_0"):
        config = tk.attention_config(kv, kv, 16, 256)
        found.append(make(f"decode attention, {kv} cache", "attend", ATTEND, config))
    found.append(make("attention merge", "merge", MERGE, tk.merge_config(16, 256, 64)))
    return found


def compile_variant(variant: Variant, target: Target) -> Compiled:
    """Compile a variant. TRITON_INTERPRET must not be set in this process."""
    from importlib import import_module

    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(import_module(f"deskside.backends.triton.{variant.module}"), variant.kernel)
    # Pointers that a variant does not read are None in a launch. Those of torch's allocator, and
    # weights in files, are aligned to 16 bytes; a launch checks and specialises likewise.
    unused = {
        "up_ptr": not variant.constants.get("FUSED"),
        "expert_ptr": not variant.constants.get("GROUPED"),
        "tile_ptr": not variant.constants.get("GROUPED"),
        "order_ptr": not variant.constants.get("GROUPED"),
    }
    constants = variant.constants | {p: None for p in variant.pointers if unused.get(p)}
    signature = {n: variant.pointers.get(n, "constexpr") for n in kernel.arg_names}
    signature |= {n: "constexpr" for n in constants}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, n in enumerate(kernel.arg_names)
        if signature[n].startswith("*") or n == "n_out"
    }
    source = ASTSource(kernel, signature, constants, aligned)
    options = {"num_warps": variant.num_warps, "num_stages": variant.num_stages}
    built = triton.compile(source, target=GPUTarget("cuda", target.arch, 32), options=options)
    usage = resources(built.asm["cubin"])
    shared = built.metadata.shared
    occupancy, limit = occupancy_of(target, usage["REG"], shared, variant.num_warps)
    return Compiled(
        variant.name,
        target.name,
        registers=usage["REG"],
        stack=usage["STACK"] + usage["LOCAL"],
        shared=shared,
        warps=variant.num_warps,
        occupancy=occupancy,
        limit=limit,
        traffic=traffic(variant.constants),
        per_weight=per_weight(variant, usage["LOOP"]),
    )


def traffic(c: dict[str, Any]) -> int:
    """Bytes of weights, state or cache that a CTA moves. Activations are in L2 or L1."""
    if "ROW_BYTES" in c:
        return int(c["BLOCK_N"] * c["ROW_BYTES"] * (2 if c["FUSED"] else 1))
    if "COLUMNS" in c:
        return int(2 * 4 * c["DIM"] * c["COLUMNS"])
    if "TILE" in c:
        from deskside.backends.triton.launch import SPLIT

        return int(SPLIT * (c["K_BYTES"] + c["V_BYTES"]))
    return int(4 * c["SPLITS"] * c["DIM"])


def per_weight(variant: Variant, loop: int) -> float | None:
    """Instructions per weight; None if there is no loop over weights, or it was unrolled."""
    c = variant.constants
    if "GROUPS" not in c or loop == 0:
        return None
    weights = c["BLOCK_N"] * c["GROUPS"] * 32 * (2 if c["FUSED"] else 1)
    return loop * 32 * variant.num_warps / weights


def resources(cubin: bytes) -> dict[str, int]:
    """REG, STACK and LOCAL as cuobjdump prints them, and LOOP: instructions of the main loop."""
    from triton import knobs

    def tool(path: str, option: str) -> str:
        done = subprocess.run([path, option, file.name], check=True, capture_output=True, text=True)
        return done.stdout

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(cubin)
        usage = tool(knobs.nvidia.cuobjdump.path, "--dump-resource-usage")
        sass = tool(knobs.nvidia.nvdisasm.path, "-c")
    numbers = {k: int(v) for k, v in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    if set(numbers) != {"REG", "STACK", "LOCAL"}:
        raise RuntimeError(f"cuobjdump printed something else than resource usage: {usage[:200]!r}")
    return numbers | {"LOOP": loop_instructions(sass)}


def loop_instructions(sass: str) -> int:
    """Instructions of the longest loop in nvdisasm's listing, 0 without a loop.

    Kernels end in a branch to itself for the instruction fetch, and NOPs. That is not counted.
    """
    longest, at, labels = 0, 0, dict[str, int]()
    for line in sass.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = at
        elif re.match(r"\s*/\*[0-9a-f]{4,}\*/\s", line):
            at += 1
            back = re.search(r"\bBRA\b.*`\((\.L_x_\d+)\)", line)
            if back and back[1] in labels:
                length = at - labels[back[1]]
                longest = max(longest, length if length > 1 else 0)
    return longest


def occupancy_of(target: Target, registers: int, shared: int, warps: int) -> tuple[float, str]:
    """Share of a multiprocessor's threads, and what limits it.

    Warps get registers in units of 256, CTAs get shared memory in units of 128 bytes.
    """
    by_warp = -(-registers * 32 // 256) * 256
    limits = {
        "threads": target.threads // (32 * warps),
        "CTAs": target.ctas,
        "registers": target.registers // by_warp // warps,
        "shared memory": target.shared // (-(-(shared + target.reserved) // 128) * 128),
    }
    limit = min(limits, key=lambda k: limits[k])
    return limits[limit] * 32 * warps / target.threads, limit


def pairs(*, few: bool = False) -> list[tuple[Variant, Target]]:
    """All variants with all targets. few: for the first target, products of IQ4_NL only."""
    return [
        (v, t)
        for v in variants()
        for t in TARGETS
        if not few or t is not TARGETS[0] or v.kernel[:3] != "mat" or v.name.startswith("IQ4_NL")
    ]


def compile_all(work: list[tuple[Variant, Target]], jobs: int = 2) -> Iterator[Compiled]:
    """Yield the results of each, in order."""
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        yield from pool.map(compile_variant, *zip(*work, strict=True))


def rows(compiled: Iterable[Compiled]) -> list[dict[str, Any]]:
    return [asdict(c) for c in compiled]
