"""Hugging Face checkpoint (safetensors) to GGUF, tensor by tensor in bounded memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from deskside.convert.checkpoint import Checkpoint, read_json, to_float32
from deskside.convert.layout import ARCHITECTURES
from deskside.convert.recipes import FILE_TYPES
from deskside.convert.source import Config, Output, Outputs
from deskside.convert.vocab import tokenizer_metadata
from deskside.errors import DesksideError
from deskside.gguf.encoders import quantize
from deskside.gguf.quants import BY_NAME, QuantType
from deskside.gguf.writer import GGUFWriter
from deskside.progress import Progress, silent

OutType = Literal["f32", "f16", "bf16", "auto"]
MATRIX_TYPES = ("F32", "F16", "BF16")
CHUNK = 1 << 22  # weights converted at a time: 16 MB as float32


def convert_hf(
    hf_dir: Path,
    out: Path,
    *,
    outtype: OutType = "auto",
    pre: str | None = None,
    progress: Progress = silent,
) -> list[str]:
    """Write the text model of the checkpoint folder `hf_dir` to the GGUF file `out`.

    `outtype` is the type of the matrices; `auto` keeps the checkpoint's own. Vectors, router and
    convolution are F32. `pre` names the pre-tokenizer where tokenizer.json's is not recognised.
    Returns notes for the user. Raises DesksideError for anything missing, damaged or not
    expressible in GGUF.
    """
    config = Config(hf_dir / "config.json", read_json(hf_dir / "config.json"))
    model_type = config.values.get("model_type")
    if not isinstance(model_type, str) or model_type not in ARCHITECTURES:
        raise config.bad(
            "model_type",
            f"{model_type!r} is not known; deskside converts {', '.join(ARCHITECTURES)}",
        )
    if config.values.get("quantization_config"):
        raise config.bad("quantization_config", "is set; convert the unquantised checkpoint")
    checkpoint = Checkpoint.open(hf_dir)
    arch, layout = ARCHITECTURES[model_type]
    outputs = Outputs(checkpoint)
    hyper_parameters = layout(config, outputs)
    tensors = outputs.finish()

    vocab, notes = tokenizer_metadata(hf_dir, config.values, hyper_parameters["vocab_size"], pre)
    matrix_type = _matrix_type(outtype, checkpoint)
    metadata: dict[str, Any] = {
        "general.architecture": arch,
        "general.type": "model",
        "general.name": _name(hf_dir),
        "general.file_type": FILE_TYPES[matrix_type.name],
        "general.quantization_version": 2,
        **{f"{arch}.{key}": value for key, value in hyper_parameters.items()},
        **vocab,
    }
    types = [matrix_type if t.narrow else BY_NAME["F32"] for t in tensors]
    table = [(t.name, kind, t.shape) for t, kind in zip(tensors, types, strict=True)]
    total = sum(part.size for t in tensors for part in t.parts)
    done = 0
    with GGUFWriter(out, metadata, table) as writer:
        for tensor, kind in zip(tensors, types, strict=True):
            for chunk in chunks(tensor):
                try:
                    encoded = quantize(chunk, kind)
                except DesksideError as error:
                    raise DesksideError(f"{hf_dir}: tensor {tensor.name}: {error}") from None
                writer.write(tensor.name, encoded)
                done += chunk.size
                progress("convert", done, total)
    return notes


def _name(folder: Path) -> str:
    """The model's name: the folder's, or the repository's in Hugging Face's cache, where a snapshot
    lies in models--OWNER--NAME/snapshots/COMMIT."""
    folder = folder.resolve()
    repository = folder.parent.parent.name
    if folder.parent.name == "snapshots" and repository.startswith("models--"):
        return repository.rpartition("--")[2]
    return folder.name


def chunks(tensor: Output) -> Iterator[NDArray[np.float32]]:
    """The tensor's rows in order, as float32 (rows, row length), at most CHUNK weights at a time
    (but at least one row)."""
    step = max(1, CHUNK // tensor.shape[0])
    order = None if tensor.rows is None else tensor.rows()
    cols = slice(None) if tensor.cols is None else tensor.cols()
    for part in tensor.parts:
        for start in range(0, len(part), step):
            stop = start + step
            rows = part[start:stop] if order is None else part[order[start:stop]]
            x = to_float32(rows[:, cols])
            yield x if tensor.apply is None else tensor.apply(x)


def _matrix_type(outtype: str, checkpoint: Checkpoint) -> QuantType:
    if outtype == "auto":
        dtypes = Counter(e.dtype for e in checkpoint.entries.values() if len(e.shape) > 1)
        outtype = dtypes.most_common(1)[0][0]
    if outtype.upper() not in MATRIX_TYPES:
        raise DesksideError(f"output type {outtype!r} is not known; use f32, f16, bf16 or auto")
    return BY_NAME[outtype.upper()]
