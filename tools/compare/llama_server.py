"""Starts llama.cpp's server from the wheel xllamacpp, for `deskside bench --vs`.

    python -m tools.compare.llama_server model.gguf --port 8080 -c 8192 &
    deskside bench -m model.gguf --vs http://127.0.0.1:8080

It serves until it is stopped. Install it with `pip install xllamacpp`, or with `make test`.
"""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path

from deskside.machine.system import usable_cores
from tests.oracles.llama_server import LlamaServer


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--port", type=int, default=8080)
    parser.add_argument("-c", "--ctx-size", type=int, default=8192)
    parser.add_argument("-t", "--threads", type=int, default=usable_cores())
    args = parser.parse_args()
    if not args.model.is_file():
        parser.error(f"{args.model} is not there")
    try:
        server = LlamaServer(str(args.model), args.ctx_size, args.threads, args.port)
    except ImportError:
        parser.error("the wheel is missing: pip install xllamacpp==2026.10.11549")
    print(f"serving {args.model} at {server.url()}", file=sys.stderr, flush=True)
    signal.sigwait({signal.SIGINT, signal.SIGTERM})


if __name__ == "__main__":
    main()
