"""ik_llama.cpp's libggml, from the wheel `ik-llama-cpp-python`: its decoders and encoders."""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

_INT, _LONG, _POINTER = ctypes.c_int, ctypes.c_int64, ctypes.c_void_p


class _InitParams(ctypes.Structure):
    _fields_ = [("size", ctypes.c_size_t), ("buffer", _POINTER), ("no_alloc", ctypes.c_bool)]


@cache
def library() -> ctypes.CDLL:
    """The library, with its table of fp16 values filled in. Skips where the wheel is missing."""
    ik = pytest.importorskip("ik_llama_cpp")
    lib = ctypes.CDLL(str(Path(ik.__file__).parent / "lib" / "libggml.so"))
    lib.ggml_init.argtypes, lib.ggml_init.restype = [_InitParams], _POINTER
    lib.ggml_free.argtypes = [_POINTER]
    lib.ggml_free(lib.ggml_init(_InitParams(1 << 16, None, True)))
    return lib


def decode(name: str, data: np.ndarray, n: int) -> np.ndarray:
    """Rows as `dequantize_row_NAME` reads them: uint8 (rows, bytes) -> float32 (rows, n)."""
    function = getattr(library(), f"dequantize_row_{name}")
    function.argtypes = [_POINTER, _POINTER, _LONG]
    out = np.empty((len(data), n), np.float32)
    for row, y in zip(data, out, strict=True):
        function(row.ctypes.data, y.ctypes.data, n)
    return out


def encode(type_id: int, x: np.ndarray, row_bytes: int) -> np.ndarray:
    """float32 (rows, n) -> uint8 (rows, row_bytes), without an importance matrix."""
    function = library().ggml_quantize_chunk
    function.restype = ctypes.c_size_t
    function.argtypes = [_INT, _POINTER, _POINTER, _LONG, _LONG, _LONG, _POINTER]
    x = np.ascontiguousarray(x)
    library().ggml_quantize_init(type_id)
    out = np.zeros((len(x), row_bytes), np.uint8)
    written = function(type_id, x.ctypes.data, out.ctypes.data, 0, *x.shape, None)
    assert written == out.nbytes
    return out


def product(type_id: int, data: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Rows times activations (n,), rounded to 8 bits in blocks of 256 -> float32 (rows,)."""
    n, q8_k = len(x), 15
    blocks = np.zeros(n // 256 * 512, np.uint8)  # a block takes less
    round_to_8_bits = library().iqk_quantize_row_q8_K
    round_to_8_bits.argtypes = [_POINTER, _POINTER, _LONG]
    round_to_8_bits(x.ctypes.data, blocks.ctypes.data, n)
    function = library().iqk_mul_mat
    function.restype = ctypes.c_bool
    matrix: list[Any] = [_INT, _POINTER, _LONG]
    function.argtypes = [_LONG, _LONG, _LONG, *matrix, *matrix, _POINTER, _LONG, _INT, _INT]
    out = np.empty(len(data), np.float32)
    left = (type_id, data.ctypes.data, data.shape[1])
    right = (q8_k, blocks.ctypes.data, blocks.nbytes)
    assert function(len(data), 1, n, *left, *right, out.ctypes.data, len(data), 0, 1)
    return out


def llama_quantize() -> Path:
    """The wheel's `llama-quantize`."""
    ik = pytest.importorskip("ik_llama_cpp")
    return Path(ik.__file__).parent / "bin" / "llama-quantize"


def interleave(type_id: int, data: np.ndarray, n: int) -> tuple[int, np.ndarray]:
    """Rows as `iqk_repack_tensor` stores them, and the type id that it gives them."""
    lib = library()
    lib.ggml_new_tensor_2d.argtypes = [_POINTER, _INT, _LONG, _LONG]
    lib.ggml_get_data.argtypes = lib.iqk_repack_tensor.argtypes = [_POINTER]
    lib.ggml_new_tensor_2d.restype = lib.ggml_get_data.restype = _POINTER
    context = lib.ggml_init(_InitParams(data.nbytes + (1 << 16), None, False))
    tensor = lib.ggml_new_tensor_2d(context, type_id, n, len(data))
    memory = lib.ggml_get_data(tensor)
    ctypes.memmove(memory, data.ctypes.data, data.nbytes)
    lib.iqk_repack_tensor(tensor)
    out = np.frombuffer(ctypes.string_at(memory, data.nbytes), np.uint8).reshape(data.shape)
    new_id = _INT.from_address(tensor).value  # the tensor's first field
    lib.ggml_free(context)
    return new_id, out


def interleave_bf16(data: np.ndarray) -> np.ndarray:
    """Rows of BF16 as BF16_R16; `iqk_repack_tensor` does so only where a CPU multiplies BF16."""
    function = library().repack_bf16_bf16_r16
    function.argtypes = [_POINTER, _POINTER, _LONG, _LONG]
    out = np.zeros_like(data)
    function(data.ctypes.data, out.ctypes.data, len(data), data.shape[1] // 2)
    return out
