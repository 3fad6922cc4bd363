"""llama.cpp's own argument parser (`common_params_parse` in the wheel xllamacpp), in a process of
its own: it exits where it finds a fault. Prints what it understood as JSON. With --program=N in
front it is the parser of another of llama.cpp's programs."""

from __future__ import annotations

import ctypes
import json
import sys
from pathlib import Path

import xllamacpp

SYMBOL = "_Z19common_params_parseiPPcR13common_params13llama_examplePFviS0_E"
SERVER = 12  # enum llama_example: LLAMA_EXAMPLE_SERVER, as of xllamacpp 2026.10
HEAD = 16  # bytes of a Python object before the struct that CommonParams holds


def main(words: list[str]) -> None:
    program = SERVER
    if words and words[0].startswith("--program="):
        program = int(words.pop(0).partition("=")[2])
        words = ["program", *words]
    (library,) = Path(xllamacpp.__file__).parent.glob("xllamacpp*.so")
    parse = getattr(ctypes.CDLL(str(library)), SYMBOL)
    parse.restype = ctypes.c_bool
    parse.argtypes = [
        ctypes.c_int, ctypes.POINTER(ctypes.c_char_p), ctypes.c_void_p, ctypes.c_int,
        ctypes.c_void_p,
    ]  # fmt: skip
    params = xllamacpp.CommonParams()
    argv = (ctypes.c_char_p * (len(words) + 1))(*(w.encode() for w in words), None)
    ok = parse(len(words), argv, id(params) + HEAD, program, None)
    understood = {
        "ok": bool(ok),
        "model": params.model.path,
        "n_ctx": params.n_ctx,
        "n_parallel": params.n_parallel,
        "n_ubatch": params.n_ubatch,
        "n_gpu_layers": params.n_gpu_layers,
        "cache_type_k": int(params.cache_type_k),
        "threads": params.cpuparams.n_threads,
        "load_mode": int(params.load_mode),
        "tensor_split": [float(x) for x in list(params.tensor_split)[:4]],
    }
    print("\n" + json.dumps(understood))


if __name__ == "__main__":
    main(sys.argv[1:])
