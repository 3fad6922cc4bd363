"""The parts of gpu_check. Each runs in its own process and reports rows as it goes.

The top level imports only the standard library, because `gpu_check.py` reads the list of parts.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
OUT = Path(os.environ.get("OUT") or ROOT / "reports")
WORK = Path(os.environ.get("GPU_CHECK_WORK") or Path(tempfile.gettempdir()) / "gpu-check")
CHECK = Path(__file__).with_name("gpu_check.py")
# Slices in the order of writing: 4.9, 17.0 and 20.7 GB. A part uses the last slice of its model
# that exists when the part begins.
SLICES = [("qwen3.5-35b-a3b", 8), ("qwen3.5-397b-a17b", 4), ("qwen3.5-35b-a3b", 40)]


@dataclass(frozen=True)
class Part:
    """A part. limit: seconds after which it is stopped; rows that it reported until then count."""

    run: Callable[[], None]
    limit: int
    needs_gpu: bool = False


PARTS: dict[str, Part] = {}


def part(limit: int, *, needs_gpu: bool = False) -> Callable[[Callable[[], None]], Any]:
    def add(run: Callable[[], None]) -> Callable[[], None]:
        PARTS[run.__name__] = Part(run, limit, needs_gpu)
        return run

    return add


def add_row(
    part: str, case: str, ok: bool | None, value: float | None = None, unit: str = "",
    beside: str = "",
) -> None:  # fmt: skip
    """Report one row of the table. ok: whether the check passed; None for a figure."""
    if os.environ.get("GPU_CHECK_AGAIN"):
        return
    row = {"part": part, "case": case, "ok": ok, "value": value, "unit": unit, "beside": beside}
    with (WORK / "rows.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")
    print("row", json.dumps(row), flush=True)


@part(40)
def machine() -> None:
    """Rates of memory and transfers, and the time of a launch, alone and as a node of a graph."""
    import torch

    from deskside import _native
    from deskside.machine import rates as own
    from deskside.machine.system import available_memory, cpu_name, usable_cores

    cores = usable_cores()
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    add_row("machine", f"{cpu_name()}, {cores} cores, {_native.choose('')}", None)
    add_row("machine", "memory", None, total / 1e9, "GB", f"{available_memory() / 1e9:.0f} free")
    for threads in sorted({1, max(1, cores - 1), cores}):
        rate = own.bandwidth(threads)
        add_row("machine", f"DRAM read, {threads} threads", None, rate / 1e9, "GB/s")
    add_row("machine", "8-bit products", None, own.compute(cores) / 1e9, "GMAC/s")
    if not torch.cuda.is_available():
        return
    p = torch.cuda.get_device_properties(0)
    free, _ = torch.cuda.mem_get_info(0)
    what = f"{p.name}, {p.multi_processor_count} SMs, torch {torch.__version__}"
    add_row("machine", what, None, free / 1e9, "GB", f"of {p.total_memory / 1e9:.1f}")
    n = 1 << 30
    a, b = (torch.empty(n, dtype=torch.uint8, device="cuda") for _ in range(2))
    add_row("machine", "device copy", None, 2e-9 * n / gpu_seconds(lambda: b.copy_(a)), "GB/s")
    host = torch.empty(n >> 2, dtype=torch.uint8, pin_memory=True)
    there = a[: n >> 2]
    for case, run in (
        ("pinned to device", lambda: there.copy_(host, non_blocking=True)),
        ("device to pinned", lambda: host.copy_(there, non_blocking=True)),
    ):
        add_row("machine", case, None, 1e-9 * (n >> 2) / gpu_seconds(run), "GB/s")
    x = torch.zeros(4096, device="cuda")

    def tiny() -> None:
        for _ in range(1000):
            x.add_(1.0)

    began = time.perf_counter()
    tiny()
    python = time.perf_counter() - began
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        tiny()
    add_row("machine", "a launch from Python", None, 1e3 * python, "us")
    add_row("machine", "a node of a graph", None, 1e3 * gpu_seconds(graph.replay), "us")


@part(110, needs_gpu=True)
def kernels() -> None:
    """tests/test_triton.py with compiled kernels, torch's decoders on CUDA, and huge matrices.

    Huge means beyond 2^31 bytes.
    """
    import numpy as np
    import torch

    from deskside.backends.torch import quants as tq
    from deskside.backends.triton import launch as tk
    from deskside.gguf.quants import BY_NAME, dequantize
    from tests.test_triton import random_rows

    junit = WORK / "junit.xml"
    workers = ["-n", str(min(8, os.cpu_count() or 1))] if has("xdist") else []
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *workers,
               f"--junitxml={junit}", str(ROOT / "tests" / "test_triton.py")]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, timeout=95)
    for case, wrong in junit_cases(junit):
        add_row("kernels", case, not wrong)
    rng = np.random.default_rng(1)
    for name in sorted(tq.TYPES):
        data = random_rows(name, (5,), 768, rng)
        got = tq.dequantize(torch.from_numpy(data).cuda(), BY_NAME[name], 768).cpu().numpy()
        same = np.array_equal(got, dequantize(data, BY_NAME[name], 768))
        add_row("kernels", f"torch decodes {name} on CUDA", same)
    x = torch.randn(64, 4096)
    same = torch.equal(tq.round_to_8_bits(x.cuda()).cpu(), tq.round_to_8_bits(x))
    add_row("kernels", "rounding to 8 bits: CUDA and CPU to the bit", same)
    # 512 experts of 1024 x 4096 as Q8_0: 2.28e9 bytes. The last one, and the first.
    rows, n = 1024, 4096
    w = torch.zeros(512, rows, BY_NAME["Q8_0"].row_bytes(n), dtype=torch.uint8, device="cuda")
    block = torch.from_numpy(random_rows("Q8_0", (rows,), n, rng)).cuda()
    w[511], w[0] = block, block
    ids = torch.tensor([[511, 0]], dtype=torch.int32, device="cuda")
    for tokens in (1, 9):
        y = tk.experts_matmul(x[:tokens].cuda(), w, "Q8_0", n, rows, ids.repeat(tokens, 1))
        wanted = x[:tokens].cuda() @ tq.dequantize(block, BY_NAME["Q8_0"], n).T
        off = (y.view(tokens, 2, rows) - wanted[:, None]).norm() / wanted.norm()
        add_row("kernels", f"an expert beyond 2^31 bytes, {tokens} tokens", bool(off < 2e-3))
    raise SystemExit(done.returncode)


@part(130)
def models() -> None:
    """Tiny models, placed in every way, compared with the reference backend and the native CPU."""
    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing import get_context

    cases = MODELS if has_cuda() else MODELS[:2]
    workers = min(len(cases), max(1, (os.cpu_count() or 1) // 3))
    wrong = False
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        for rows in pool.map(model_rows, cases):
            for row in rows:
                add_row("models", *row)
                wrong |= not row[1]
    raise SystemExit(wrong)


# Preset, types ("" = the preset's own mix), cache, bound of the relative error of float models.
MODELS = [
    ("tiny-moe", "F32", "f32", 1e-4),
    ("tiny-moe", "", "q8_0", None),
    ("tiny-dense", "Q8_0", "f16", None),
    ("tiny-qwen3moe", "", "f16", None),
    ("tiny-llama", "F16", "f16", 5e-3),
]


def model_rows(model: tuple[str, str, str, float | None]) -> list[tuple[str, bool, float, str]]:
    """Rows of one model: (case, whether it is right, its error, unit)."""
    import numpy as np

    from deskside.backends.native.program import CpuBackend
    from deskside.backends.reference import ReferenceBackend
    from deskside.gguf import GGUF
    from deskside.gguf.quants import quant_type
    from deskside.machine.host import HostOptions
    from deskside.models import build_tape
    from deskside.tape.cache import Cache
    from tests.models import tiny

    preset, types, kv, bound = model
    file = GGUF.open(tiny(preset, types))
    tape = build_tape(file)
    shape: dict[str, Any] = {
        "n_slots": 3,
        "n_ctx": 128,
        "k_type": quant_type(kv),
        "v_type": quant_type(kv),
    }
    plain = Cache(tape.states, **shape)
    reference = session(ReferenceBackend(file, tape), plain)

    def error(out: Any) -> float:
        a, b = np.concatenate(out), np.concatenate(reference)
        return float(np.linalg.norm(a - b) / np.linalg.norm(b))

    cpu = CpuBackend(file, tape, HostOptions(), max_tokens=64)
    own = error(session(cpu, Cache(tape.states, **shape)))
    allowed = bound or 1.5 * own + 2e-3
    rows: list[tuple[str, bool, float, str]] = []
    first: list[Any] = []
    name = f"{preset} {types or 'mixed'} {kv}"

    def same_as_first(out: list[Any]) -> bool:
        return all(np.array_equal(a, b) for a, b in zip(out, first, strict=True))

    for way, options in ways(tape).items():
        try:
            backend = placed(file, tape, **options)
            out = session(backend, backend.new_cache(**shape))
            off = error(out)
            rows.append((f"{name}: {way}", off <= allowed, off, "rel."))
            if way == "gpu":
                first = out
                out = session(backend, backend.new_cache(**shape))
                rows.append((f"{name}: the same bits again", same_as_first(out), off, "rel."))
            elif way == "gpu without graphs":
                rows.append((f"{name}: graphs give the ops' bits", same_as_first(out), off, "rel."))
            offload = backend.expert_metrics
            if way in ("streamed", "cached"):
                used = offload.streamed if way == "streamed" else offload.hits
                rows.append((f"{name}: {way} at all", used > 0, used, "experts"))
        except Exception as failure:  # so that the other ways still run
            import traceback

            traceback.print_exc()
            rows.append((f"{name} {way}: {type(failure).__name__} {failure}", False, 0.0, ""))
    if (preset, types) == ("tiny-moe", "F32"):
        rows.append(after_a_failed_capture(file, tape, shape, first))
    return rows


def after_a_failed_capture(
    file: Any, tape: Any, shape: Any, wanted: list[Any]
) -> tuple[str, bool, float, str]:
    """Check that a failed capture harms nothing else. To fail it, one op waits for the device.

    Then its section must run op by op with right results. Another section, and another cache, must
    still be captured.
    """
    import warnings

    import numpy as np

    from deskside.backends.torch import ops as torch_ops

    usual = torch_ops.OPS["gated_norm"]

    def waits(op: Any, inputs: Any, step: Any) -> Any:
        made = usual(op, inputs, step)
        return [x * 1 if x[0, 0].item() == x[0, 0].item() else x for x in made]

    backend = placed(file, tape, moe=True)
    torch_ops.OPS["gated_norm"] = waits
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            out = session(backend, backend.new_cache(**shape))
    finally:
        torch_ops.OPS["gated_norm"] = usual
    captures = backend.devices[DEVICE].graphs.captures
    off = float(np.linalg.norm(np.concatenate(out) - np.concatenate(wanted)))
    right = off <= 1e-4 * float(np.linalg.norm(np.concatenate(wanted)))
    return "after a failed capture others succeed", right and captures > 0, captures, "captures"


def ways(tape: Any) -> dict[str, dict[str, Any]]:
    from deskside.backends.experts.resident import ExpertCache
    from deskside.backends.experts.stream import StreamOptions

    found: dict[str, dict[str, Any]] = {"gpu": {}, "gpu without graphs": {"graphs": False}}
    if has_cuda():
        found["gpu, torch's own ops"] = {"kernels": False}
    if any(op.kind == "experts" for op in tape.ops):
        found |= {
            "cpu-moe": {"moe": True},
            "streamed": {"moe": True, "stream": StreamOptions(DEVICE, 17, 1 << 20)},
            "cached": {"moe": True, "expert_cache": ExpertCache(DEVICE, 1 << 20)},
        }
    return found


@part(60)
def cli() -> None:
    """Commands of a user: doctor, and the bundled model on the device and split with the CPU."""
    device = "cuda0" if has_cuda() else "emu0:1GiB"
    code = "from deskside.cli import main; main()"
    done = {}
    for case, args in {
        "doctor": ["doctor", "--quick", "--no-store", "--json"],
        "cpu": ASK,
        "gpu": [*ASK, "--device", device],
        "cpu-moe": [*ASK, "--device", device, "--cpu-moe"],
    }.items():
        command = [sys.executable, "-c", code, *args]
        done[case] = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=60)
        print(case, done[case].stdout)
        same = (
            done[case].stdout[:40] == done["cpu"].stdout[:40] if case in ("gpu", "cpu-moe") else 1
        )
        add_row("cli", f"deskside {' '.join(args)}", bool(not done[case].returncode and same))
    raise SystemExit(any(d.returncode for d in done.values()))


ASK = ["run", "--temp", "0", "-n", "24", "-p", "What does os.path.join do?"]


@part(75, needs_gpu=True)
def sanitize() -> None:
    """Run a few launches of every kernel under memcheck.

    Without torch's memory cache, each tensor is its own allocation, so memcheck sees a read past
    its end.
    """
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        add_row("sanitize", "skipped: no compute-sanitizer", None)
        return
    env = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    command = [tool, "--tool", "memcheck", "--error-exitcode", "99", "--print-limit", "5",
               sys.executable, str(CHECK), "--part", "launches"]  # fmt: skip
    raise SystemExit(subprocess.run(command, env=env).returncode)


def launches() -> None:
    """Launches for `sanitize`: both products, grouped and not, of the types with the oddest blocks;
    the delta net's step; attention over both caches."""
    import numpy as np
    import torch

    from deskside.backends.triton import launch as tk
    from deskside.gguf.quants import BY_NAME
    from tests.test_triton import random_rows

    rng = np.random.default_rng(2)

    def cuda(x: Any) -> Any:
        return torch.from_numpy(np.ascontiguousarray(x)).cuda()

    for name in ("IQ4_NL", "Q6_K", "IQ4_KSS"):
        for rows in (1, 5, 65):
            x = cuda(rng.standard_normal((rows, 256)).astype(np.float32))
            tk.matmul(x, cuda(random_rows(name, (19,), 256, rng)), name, 256, 19)
        w = cuda(random_rows(name, (5, 19), 256, rng))
        for tokens in (1, 9):
            x = cuda(rng.standard_normal((tokens, 256)).astype(np.float32))
            ids = cuda(rng.integers(-1, 5, (tokens, 2)).astype(np.int32))
            tk.experts_matmul(x, w, name, 256, 19, ids, w)

    def f(*shape: int) -> Any:
        return cuda(rng.standard_normal(shape).astype(np.float32))

    slots = cuda(np.array([2, 0], np.int32))
    tk.delta_step(
        f(2, 8 * 64), f(2, 4), f(2, 4), -f(4).abs(), f(4), f(3, 4, 64, 64), slots,
        k_heads=2, eps=1e-6,
    )  # fmt: skip
    for kv in ("f16", "q8_0"):
        size = BY_NAME[kv.upper()].row_bytes(64)
        k = torch.zeros(3, 2, 70, size, dtype=torch.uint8, device="cuda")
        tk.decode_attention(
            f(2, 6 * 64), k, k.clone(), slots, cuda(np.array([70, 33], np.int32)),
            k_type=kv, v_type=kv, dim=64, scale=0.125, splits=3,
        )  # fmt: skip
    torch.cuda.synchronize()


@part(80, needs_gpu=True)
def bandwidth() -> None:
    """Weight bytes per second of the decode kernels, as a share of a device copy's rate."""
    import numpy as np
    import torch

    from deskside.backends.triton import launch as tk
    from deskside.backends.triton.decode import PAIR
    from tests.test_triton import random_rows

    a, b = (torch.empty(1 << 29, dtype=torch.uint8, device="cuda") for _ in range(2))
    copy = 2 * a.numel() / gpu_seconds(lambda: b.copy_(a))
    rng = np.random.default_rng(3)
    n, rows = 4096, 32768  # 75 MB and more, larger than the L2, which is flushed anyway
    for name in PAIR:
        w = torch.from_numpy(random_rows(name, (512,), n, rng)).cuda().repeat(rows // 512, 1)
        for m in (1, 4, 512) if name in ("IQ4_NL", "Q8_0") else (1,):
            x = torch.randn(m, n, device="cuda")
            seconds = gpu_seconds(partial(tk.matmul, x, w, name, n, rows))
            if m < 100:
                rate = w.numel() / seconds
                beside = f"{rate / copy:.0%} of a copy"
                add_row("bandwidth", f"{name}, {m} rows", None, rate / 1e9, "GB/s", beside)
            else:
                rate = 2 * m * n * rows / seconds
                add_row("bandwidth", f"{name}, {m} rows", None, rate / 1e12, "TFLOP/s")
    # The 397b's experts at decode: 10 of 512, gate and up, then down.
    x, ids = torch.randn(1, n, device="cuda"), torch.randperm(64, device="cuda")[:10].view(1, 10)
    one = torch.from_numpy(random_rows("IQ4_NL", (1024,), n, rng)).cuda()
    w = one[None].repeat(64, 1, 1)
    up = w.clone()
    seconds = gpu_seconds(lambda: tk.experts_matmul(x, w, "IQ4_NL", n, 1024, ids.int(), up))
    rate = 2 * 10 * one.numel() / seconds
    beside = f"{rate / copy:.0%} of a copy"
    add_row("bandwidth", "IQ4_NL experts, gate and up", None, rate / 1e9, "GB/s", beside)


@part(150)
def decode() -> None:
    """A slice of the 35b: prefill and decode on the CPU, on both, on the GPU; launches a token."""
    from deskside.backends.experts.resident import ExpertCache

    path = slice_of("35b", wait=60)
    ways: dict[str, dict[str, Any]] = {
        "gpu": {},
        "cpu-moe": {"moe": True},
        "cpu": {"cpu": True},
        "cpu-moe, a core spare": {"moe": True, "spare": 1},
        "gpu without graphs": {"graphs": False},
        "cpu-moe, 4 GiB of experts": {"moe": True, "expert_cache": ExpertCache(DEVICE, 4 << 30)},
    }
    for way, options in ways.items():
        measure("decode", way, path, options)


@part(100)
def stream() -> None:
    """Four layers of the 397b with experts on the CPU: decode, and a long prompt with and without
    streaming."""
    from deskside.backends.experts.stream import StreamOptions

    path = slice_of("397b", wait=60)
    long = 4096 if has_cuda() else 64
    ways: dict[str, dict[str, Any]] = {
        "cpu-moe": {"moe": True, "prompt": min(512, long)},
        "streamed": {"moe": True, "prompt": long, "stream": StreamOptions(DEVICE, 33, 256 << 20)},
        "cpu": {"cpu": True, "prompt": min(512, long)},
    }
    for way, options in ways.items():
        measure("stream", way, path, options)


@part(90)
def threads() -> None:
    """Decode and prefill on the CPU for each number of threads, beside their read bandwidth.

    This part is last, so that nothing else runs. It also uses the whole model, if that exists.
    """
    import numpy as np

    from deskside import LLM, SamplingParams
    from deskside.machine import rates
    from deskside.machine.system import usable_cores
    from deskside.tape.cost import Work

    cores = usable_cores()
    counts = sorted({n for n in (1, 2, 4, 8, 12, cores - 1, cores) if 0 < n <= cores})
    nbytes = 4 << 30 if has_cuda() else 1 << 27
    read = rates.reader(cores, nbytes=nbytes)
    bandwidth = {n: read.read(n, 3) for n in counts}
    del read
    small, large = slice_of("35b", wait=1, first=True), slice_of("35b", wait=1)
    prompt = 512 if has_cuda() else 32
    ids = np.random.default_rng(0).integers(0, 2000, prompt).tolist()
    params = SamplingParams(max_tokens=40, temperature=0, ignore_eos=True)
    for path, n in [*((small, n) for n in counts), (large, cores)]:
        llm = LLM(path, ctx=prompt + 64, threads=n)
        llm.generate(ids, params)  # warms up pages and threads
        llm.reset()
        t = llm.generate(ids, params).timings
        work = Work.of(llm.tape).decode(prompt, "f16")["bytes"]
        share = t.decode_rate * work / bandwidth[n]
        case = f"{path.stem}, {n} threads"
        beside = f"{share:.0%} of {bandwidth[n] / 1e9:.1f} GB/s"
        add_row("threads", f"{case}: decode", None, t.decode_rate, "tok/s", beside)
        add_row("threads", f"{case}: prefill of {prompt}", None, t.prefill_rate, "tok/s")
        del llm


# ---- shared by the parts ------------------------------------------------------------------------

DEVICE = "gpu0"  # deskside's name for cuda:0, or for torch on the CPU if there is no GPU


def has(module: str) -> bool:
    import importlib.util

    return importlib.util.find_spec(module) is not None


def has_cuda() -> bool:
    import torch

    return bool(torch.cuda.is_available())


def placed(
    file: Any, tape: Any, *, moe: bool = False, graphs: bool | None = None, kernels: bool = True,
    max_tokens: int = 64, spare: int = 0, **options: Any,
) -> Any:  # fmt: skip
    """A model with all but the embedding on the device. moe: routed experts on the CPU, too."""
    import torch

    from deskside.backends.placed import PlacedBackend
    from deskside.backends.placed import kernels as kernels_there
    from deskside.backends.torch.device import TorchDevice
    from deskside.backends.torch.kernels import NONE
    from deskside.machine.host import HostOptions
    from deskside.machine.system import usable_cores

    graphs = True if graphs is None else graphs
    device: TorchDevice
    if has_cuda():
        table = kernels_there() if kernels else NONE
        device = TorchDevice(DEVICE, torch.device("cuda", 0), kernels=table, graphs=graphs)
    else:
        from tests.torch_devices import FakeDevice

        device = FakeDevice(DEVICE, 8 << 30, graphs=graphs)
    host = ("token_embd", "_exps") if moe else ("token_embd",)
    names = {n: "cpu" if any(h in n for h in host) else DEVICE for n in tape.weights()}
    threads = max(1, usable_cores() - spare)
    return PlacedBackend(
        file, tape, names, [device], HostOptions(threads), max_tokens=max_tokens,
        max_outputs=64, **options,
    )  # fmt: skip


def session(backend: Any, cache: Any) -> list[Any]:
    """Logits of a prompt in two steps, of single tokens (run, captured, replayed), and of several
    sequences together."""
    from tests.placements import IDS, batch

    steps = [batch((0, 0, IDS[:23]), outputs=[]), batch((0, 23, IDS[23:42]))]
    steps += [batch((0, 42 + i, IDS[42 + i : 43 + i])) for i in range(5)]
    steps.append(batch((2, 0, IDS[50:59]), (0, 47, IDS[47:48]), (1, 0, IDS[60:75])))
    for i in range(4):
        parts = [(2, 9 + i, IDS[i : i + 1]), (0, 48 + i, IDS[i : i + 1]), (1, 15 + i, IDS[7:8])]
        steps.append(batch(*parts[: 3 - i % 2]))
    return [backend.run(step, cache) for step in steps]


def measure(part: str, way: str, path: Path, options: dict[str, Any]) -> None:
    """Measure one way to run a file. A failure is a row, so that the next way is still measured."""
    import gc

    from deskside.backends.native.program import CpuBackend
    from deskside.gguf import GGUF
    from deskside.gguf.quants import quant_type
    from deskside.machine.host import HostOptions
    from deskside.machine.system import usable_cores
    from deskside.models import build_tape
    from deskside.tape.cache import Cache

    file = GGUF.open(path)
    tape = build_tape(file)
    options = dict(options)
    prompt = options.pop("prompt", 512 if has_cuda() else 32)
    kv = quant_type("q8_0")
    shape = {"n_slots": 1, "n_ctx": prompt + 128, "k_type": kv, "v_type": kv}
    backend: Any = None
    cache: Any = None
    began = time.perf_counter()
    try:
        if options.pop("cpu", False):
            backend = CpuBackend(file, tape, HostOptions(usable_cores()), max_tokens=prompt)
            cache = Cache(tape.states, **shape)
        else:
            backend = placed(file, tape, max_tokens=prompt, **options)
            cache = backend.new_cache(**shape)
        add_row(part, f"{path.stem}, {way}: loading", None, time.perf_counter() - began, "s",
                f"{file_bytes(path) / 1e9:.1f} GB")  # fmt: skip
        step_rows(part, way, backend, cache, tape, prompt)
        if getattr(backend, "expert_metrics", None) and options:
            print(way, backend.expert_metrics)
    except Exception as failure:
        import traceback

        traceback.print_exc()
        add_row(part, f"{way}: {type(failure).__name__} {failure}", False)
    finally:
        backend = cache = None
        gc.collect()
        if has_cuda():
            import torch

            torch.cuda.empty_cache()


def step_rows(part: str, way: str, backend: Any, cache: Any, tape: Any, prompt: int) -> None:
    """Rates of a prompt of `prompt` tokens and of the tokens after it."""
    import numpy as np

    from deskside.backends.native.program import CpuBackend
    from deskside.tape.cache import Batch, Segment
    from deskside.tape.cost import Work

    ids = np.random.default_rng(0).integers(0, 2000, prompt + 128).astype(np.int32)

    def step(pos: int, n: int) -> float:
        began = time.perf_counter()
        last = np.array([n - 1], np.int32)
        backend.run(Batch(ids[pos : pos + n], (Segment(0, pos, n),), last), cache)
        return time.perf_counter() - began

    prefill = []
    for _ in range(2):  # the first one compiles
        cache.clear(0)
        prefill.append(step(0, prompt))
    tokens = [step(prompt + i, 1) for i in range(40)]
    work = Work.of(tape).decode(prompt, "q8_0")["bytes"]
    rate = 1 / statistics.median(tokens[10:])
    add_row(part, f"{way}: prefill of {prompt}", None, prompt / prefill[1], "tok/s",
            f"first {prefill[0]:.2f} s")  # fmt: skip
    add_row(part, f"{way}: decode", None, rate, "tok/s", f"{rate * work / 1e9:.0f} GB/s")
    add_row(part, f"{way}: first, second token", None, 1e3 * tokens[0], "ms",
            f"{1e3 * tokens[1]:.0f} ms, worst later {1e3 * max(tokens[2:]):.0f}")  # fmt: skip
    if has_cuda() and not isinstance(backend, CpuBackend):
        count, busy = profiled(lambda: step(prompt + 40, 1))
        add_row(part, f"{way}: kernels of a token", None, count, "", f"busy {1e3 * busy:.2f} ms")


def profiled(run: Callable[[], object]) -> tuple[int, float]:
    """Kernels and copies that the device ran, and the seconds it was busy.

    Prints the most expensive ones to the log.
    """
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as p:
        run()
    events = [e for e in p.events() if "CUDA" in str(e.device_type)]
    print(p.key_averages().table(sort_by="self_device_time_total", row_limit=25))
    return len(events), 1e-6 * sum(e.time_range.elapsed_us() for e in events)


def gpu_seconds(run: Callable[[], object]) -> float:
    """Median seconds of a call. The L2 is flushed before each call."""
    from triton.testing import do_bench

    return 1e-3 * float(do_bench(run, warmup=10, rep=60, return_mode="median"))


def file_bytes(path: Path) -> int:
    return path.stat().st_size


def slice_of(kind: str, wait: float, first: bool = False) -> Path:
    """The last slice that is written, or the first; `wait` seconds for one. Tiny without a GPU."""
    if not has_cuda():
        from tests.models import tiny

        return tiny("tiny-moe")
    until = time.monotonic() + wait
    while True:
        folder = Path(os.environ["GPU_CHECK_SLICES"])
        paths = [folder / f"{preset}-{layers}.gguf" for preset, layers in SLICES if kind in preset]
        if found := [p for p in paths if p.exists()]:
            return found[0 if first else -1]
        if time.monotonic() > until:
            raise SystemExit(f"no slice of {kind} is written yet")
        time.sleep(1)


def junit_cases(path: Path) -> Iterator[tuple[str, bool]]:
    """(name, whether it failed) of every test in a JUnit file."""
    from xml.etree import ElementTree

    for case in ElementTree.parse(path).iter("testcase"):
        if case.find("skipped") is None:
            bad = case.find("failure") is not None or case.find("error") is not None
            yield case.get("name", "?"), bad
