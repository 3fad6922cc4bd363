"""llama.cpp's parameter structs, by the names of its llama.h (as of xllamacpp 2026.10).

A library of another version may have other fields: `check_layout` compares known defaults. Both
structs are longer than the library's own. One of this size travels on the stack, where the callee
reads only the bytes that it knows, so fields appended later do no harm.
"""

from __future__ import annotations

import ctypes

_SPARE = ("spare", ctypes.c_uint8 * 256)


def _fields(spec: str) -> list[tuple[str, type]]:
    """Fields from lines of "type: names"."""
    types = {
        "u32": ctypes.c_uint32,
        "i32": ctypes.c_int32,
        "f32": ctypes.c_float,
        "size": ctypes.c_size_t,
        "ptr": ctypes.c_void_p,
        "bool": ctypes.c_bool,
    }
    lines = (line.split(":") for line in spec.strip().splitlines())
    return [(name, types[kind.strip()]) for kind, names in lines for name in names.split()]


class ModelParams(ctypes.Structure):
    """llama_model_params."""

    _fields_ = [
        *_fields("""
            ptr: devices tensor_buft_overrides
            i32: n_gpu_layers split_mode load_mode lazy_mode main_gpu
            ptr: tensor_split progress_callback progress_callback_user_data kv_overrides
            bool: vocab_only check_tensors use_extra_bufts no_host no_alloc load_mtp
        """),
        _SPARE,
    ]


class ContextParams(ctypes.Structure):
    """llama_context_params."""

    _fields_ = [
        *_fields("""
            u32: n_ctx n_batch n_ubatch n_seq_max n_rs_seq n_outputs_max n_outputs_max_per_seq
            i32: n_threads n_threads_batch
            i32: ctx_type rope_scaling_type pooling_type attention_type flash_attn_type
            f32: rope_freq_base rope_freq_scale yarn_ext_factor yarn_attn_factor
            f32: yarn_beta_fast yarn_beta_slow
            u32: yarn_orig_ctx
            f32: defrag_thold
            ptr: cb_eval cb_eval_user_data
            i32: type_k type_v
            size: moe_cache_size
            ptr: abort_callback abort_callback_data
            bool: embeddings offload_kqv no_perf op_offload swa_full kv_unified
            ptr: samplers
            size: n_samplers
            ptr: ctx_other
        """),
        _SPARE,
    ]


class Batch(ctypes.Structure):
    """llama_batch."""

    _fields_ = [
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.POINTER(ctypes.c_int32)),
        ("embd", ctypes.POINTER(ctypes.c_float)),
        ("pos", ctypes.POINTER(ctypes.c_int32)),
        ("n_seq_id", ctypes.POINTER(ctypes.c_int32)),
        ("seq_id", ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    ]


CONTEXT_DEFAULTS = {
    "n_ctx": 512,
    "n_batch": 2048,
    "n_ubatch": 512,
    "n_seq_max": 1,
    "n_threads": 4,
    "n_threads_batch": 4,
    "rope_scaling_type": -1,
    "attention_type": -1,
    "flash_attn_type": -1,
    "yarn_ext_factor": -1.0,
    "type_k": 1,
    "type_v": 1,
    "op_offload": True,
    "kv_unified": False,
}
MODEL_DEFAULTS = {"vocab_only": False, "use_extra_bufts": True, "no_host": False}


def check_layout(model: ModelParams, context: ContextParams) -> None:
    """RuntimeError if a field's default is not where it is expected."""
    for params, defaults in ((model, MODEL_DEFAULTS), (context, CONTEXT_DEFAULTS)):
        for name, default in defaults.items():
            value = getattr(params, name)
            if value != default:
                raise RuntimeError(
                    f"unknown layout of {type(params).__name__}: {name} is {value}, not {default}"
                )
