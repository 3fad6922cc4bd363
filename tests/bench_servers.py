"""Servers for tests of deskside bench: llama-server's API and OpenAI's, well-behaved or not."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

N_CTX = 4096
CHARS = 3  # of a token of the fake vocabulary
BAD_JSON = b"data: {not json}\n\n"


class Server(ThreadingHTTPServer):
    """One of two APIs. `misbehave(handler, n)` is called before the n-th token of an answer and may
    do anything with the connection; True ends the answer."""

    daemon_threads = True

    def __init__(self, api: str, **options: Any) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.api = api
        self.requests: list[dict[str, Any]] = []
        self.misbehave: Callable[[Handler, int], bool] = lambda handler, n: False
        self.timings = options.pop("timings", True)
        self.usage = options.pop("usage", True)
        self.strict = options.pop("strict", False)  # refuses fields that OpenAI does not have
        self.chat_only = options.pop("chat_only", False)
        self.refuse: tuple[int, bytes] | None = None
        self.token_seconds = options.pop("token_seconds", 0.0)
        assert not options
        self.cached: list[int] = []

    def handle_error(self, *_: Any) -> None:
        """Clients may go away."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *_: Any) -> None:
        pass

    def reply(self, status: int, body: Any) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self) -> None:
        if self.path == "/props" and self.server.api == "llama":
            settings = {"n_ctx": N_CTX}
            props = {
                "default_generation_settings": settings,
                "total_slots": 1,
                "model_path": "/nowhere/fake.gguf",
                "build_info": "b1-fake",
            }
            return self.reply(200, props)
        if self.path == "/v1/models":
            return self.reply(200, {"data": [{"id": "fake", "max_model_len": N_CTX}]})
        return self.reply(404, {"error": {"message": "no such page"}})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/tokenize" and self.server.api == "llama":
            text = body["content"]
            ids = [sum(text[i : i + CHARS].encode()) for i in range(0, len(text), CHARS)]
            return self.reply(200, {"tokens": ids})
        self.server.requests.append(body)
        if self.server.refuse is not None:
            return self.reply(*self.server.refuse)
        if self.path == "/completion" and self.server.api == "llama":
            return self.complete(body)
        chat = self.path == "/v1/chat/completions"
        if self.server.api == "openai" and (chat or self.path == "/v1/completions"):
            if self.server.chat_only and not chat:
                return self.reply(404, {"error": "not here"})
            if self.server.strict and "ignore_eos" in body:
                return self.reply(400, {"error": {"message": "Unrecognized argument: ignore_eos"}})
            return self.openai(body, chat)
        return self.reply(404, {"error": {"message": "no such page"}})

    def begin(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()

    def event(self, data: Any) -> None:
        self.wfile.write(b"data: " + json.dumps(data).encode() + b"\n\n")
        self.wfile.flush()

    def tokens(self, n: int) -> Iterator[int]:
        """Numbers of the tokens of an answer, until it is made to end."""
        for i in range(n):
            if self.server.misbehave(self, i):
                return
            time.sleep(self.server.token_seconds)
            yield i

    def complete(self, body: dict[str, Any]) -> None:
        prompt = body["prompt"]
        n_prompt, n = len(prompt), body["n_predict"]
        cached = 0
        if body["cache_prompt"]:
            pairs = zip(prompt[:-1], self.server.cached, strict=False)
            shared = min(n_prompt - 1, len(self.server.cached))
            cached = next((i for i, (a, b) in enumerate(pairs) if a != b), shared)
        self.begin()
        made: list[int] = []
        for i in self.tokens(n):
            made.append(1000 + i)
            event = {"content": "abc", "tokens": [1000 + i], "stop": False}
            self.event({**event, "tokens_predicted": i + 1, "tokens_evaluated": n_prompt})
        if len(made) < n:
            return
        self.server.cached = prompt + made[:-1]
        last: dict[str, Any] = {
            "content": "",
            "tokens": [],
            "stop": True,
            "stop_type": "limit",
            "tokens_predicted": n,
            "tokens_evaluated": n_prompt,
        }
        if self.server.timings:
            last["timings"] = {
                "cache_n": cached,
                "prompt_n": n_prompt - cached,
                "prompt_ms": 2.0 * (n_prompt - cached),
                "predicted_n": n,
                "predicted_ms": 10.0 * (n - 1),
            }
        self.event(last)

    def openai(self, body: dict[str, Any], chat: bool) -> None:
        text = body["messages"][0]["content"] if chat else body["prompt"]
        n_prompt = len(text) // 5 + (9 if chat else 1)
        n = body["max_tokens"]
        usage = {"prompt_tokens": n_prompt, "completion_tokens": n}
        if not body.get("stream"):
            return self.reply(200, {"choices": [{"text": "x"}], "usage": usage})
        self.begin()
        if chat:
            self.event({"choices": [{"delta": {"role": "assistant", "content": ""}}]})
        made = 0
        for made in self.tokens(n):  # noqa: B007 - the last one tells whether all were made
            said: dict[str, Any] = {"delta": {"content": "abc"}} if chat else {"text": "abc"}
            self.event({"choices": [said]})
        if made + 1 < n:
            return None
        self.event({"choices": [{"text": "", "delta": {}, "finish_reason": "length"}]})
        if self.server.usage:
            self.event({"choices": [], "usage": usage})
        self.wfile.write(b"data: [DONE]\n\n")
        return None


@contextmanager
def serving(api: str, **options: Any) -> Iterator[Server]:
    server = Server(api, **options)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
