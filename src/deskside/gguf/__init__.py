"""GGUF files: quant types, header, reader, writer, encoders."""

from deskside.gguf.header import TensorInfo
from deskside.gguf.reader import GGUF

__all__ = ["GGUF", "TensorInfo"]
