"""llama.cpp's server from the wheel xllamacpp, in a process of its own (see `remote.py`)."""

from __future__ import annotations


class LlamaServer:
    """Serves a model on this machine, on a free port unless one is given; `url()` tells where."""

    def __init__(self, path: str, n_ctx: int, threads: int = 1, port: int = 0) -> None:
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.model.path = path
        params.n_ctx, params.n_parallel, params.port = n_ctx, 1, port
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
        self._server = xllamacpp.Server(params)

    def url(self) -> str:
        return str(self._server.listening_address)
