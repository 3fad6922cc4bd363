r"""Text from the command line: llama.cpp's escapes, and bytes that may be no UTF-8.

llama.cpp reads \n \r \t \' \" \\ and \xHH (a byte) in -p, -f and -r unless --no-escape is given;
any other backslash stays.
"""

from __future__ import annotations

import re

from deskside.console import note

_ESCAPE = re.compile(rb"\\(?:([nrt'\"\\])|x([0-9a-fA-F]{2}))")
_MEANS = {b"n": b"\n", b"r": b"\r", b"t": b"\t", b"'": b"'", b'"': b'"', b"\\": b"\\"}


def unescaped(data: bytes) -> bytes:
    """`data` with the escapes replaced by what they stand for."""

    def meaning(found: re.Match[bytes]) -> bytes:
        return _MEANS[found[1]] if found[1] else bytes.fromhex(found[2].decode())

    return _ESCAPE.sub(meaning, data)


def as_bytes(argument: str) -> bytes:
    """An argument of the command line as it was typed; Python keeps odd bytes as surrogates."""
    return argument.encode("utf-8", "surrogateescape")


def as_text(data: bytes, source: str, *, escape: bool = False) -> str:
    """Text of UTF-8, without a byte-order mark; a note says that other bytes became U+FFFD.

    source: what the note names. escape: whether escapes are replaced.
    """
    data = data.removeprefix(b"\xef\xbb\xbf")
    if escape:
        data = unescaped(data)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        note(f"{source} is not all UTF-8; the rest is read as \N{REPLACEMENT CHARACTER}")
        return data.decode("utf-8", "replace")
