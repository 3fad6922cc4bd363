"""llama.cpp's server from the wheel xllamacpp, in a process of its own (see `remote.py`)."""

from __future__ import annotations


class LlamaServer:
    """Serves a model on a free port of this machine; `url()` tells where."""

    def __init__(self, path: str, n_ctx: int) -> None:
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.model.path = path
        params.n_ctx, params.n_parallel, params.port = n_ctx, 1, 0
        params.cpuparams.n_threads = 1
        self._server = xllamacpp.Server(params)

    def url(self) -> str:
        return str(self._server.listening_address)
