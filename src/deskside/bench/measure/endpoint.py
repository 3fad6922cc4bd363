"""Measures a server: over llama-server's own API if it has that, else over OpenAI's.

A run's `clock` is "server" if the last event has llama-server's `timings`, else "stream": arrival
here. Gaps between tokens, and the time to the first token, are always those of arrival.
"""

from __future__ import annotations

import itertools
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any
from urllib.parse import urlsplit

from deskside.bench.measure import answers
from deskside.bench.measure.arrivals import Arrivals, timed
from deskside.bench.measure.ceiling import Roof
from deskside.bench.measure.hashes import hashed
from deskside.bench.measure.text import Token
from deskside.bench.predict import slices
from deskside.bench.record import ModelFile, Part, Run, Target
from deskside.engine.sampler import SamplingParams
from deskside.errors import DesksideError
from deskside.gguf import GGUF
from deskside.machine.system import usable_cores
from deskside.models import build_tape
from deskside.progress import Progress, silent
from deskside.server.client import EndpointError, HttpError, Wire, count, words
from deskside.tape.cost import Work

STOPS = {"limit": "length", "eos": "stop", "word": "stop"}
# Request fields of llama-server, vLLM and SGLang that OpenAI's API lacks.
EXTENSIONS = ("top_k", "min_p", "repeat_penalty", "repetition_penalty", "ignore_eos")
# Most events of an answer without a token, such as its role, its stop reason and its usage.
ENDS = 4
# Characters of two prompts. From their token counts follow the characters per token.
SAMPLES = (300, 2100)


class Endpoint:
    """What both kinds of server share. `connect` finds out which kind it is."""

    own = False

    def __init__(self, wire: Wire, name: str, engine: str, n_ctx: int | None) -> None:
        self.wire = wire
        self.name = name
        self.engine = engine
        self.n_ctx = n_ctx
        self.limit = f"{wire.url} has a context of {n_ctx}"
        self.local = is_local(wire.host)
        self.files: list[ModelFile] = []
        self.random = False
        self.part: Part | None = None
        self.options: dict[str, Any] = {}
        self._roof: Roof | None = None

    def describe(self) -> Target:
        return Target(
            kind="endpoint",
            name=self.name,
            engine=self.engine,
            url=self.wire.url,
            options=self.options,
            files=self.files,
            n_ctx=self.n_ctx,
            random=self.random,
            part=self.part,
        )

    def roof(self) -> Roof | None:
        return self._roof

    def serves(self, path: Path, *, sha: bool, progress: Progress) -> None:
        """Note that the server runs here and serves the file `path`.

        That gives the hash and the ceilings. Ceilings assume an f16 cache and all cores.
        """
        file = GGUF.open(path)
        self.files = hashed(file.paths, sha, progress)
        self.random, self.part = slices.is_random(file), slices.part(file)
        self._roof = Roof(Work.of(build_tape(file)), usable_cores(), 512, "f16", "f16")

    def _expect_at_most(self, asked: int | None, came: int) -> None:
        if asked is not None and came > asked:
            raise EndpointError(f"{self.wire.url}: streams more than the {asked} tokens asked for")

    def check(self) -> None:
        try:
            self.wire.get("/v1/models")
        except HttpError as failure:
            if failure.status >= 500:
                raise

    def close(self) -> None:
        self.wire.close()


class LlamaServer(Endpoint):
    """llama-server's `/completion`: takes token ids, reports times, can switch its cache off."""

    caches = False

    def encode(self, text: str, first: bool) -> list[Token]:
        body = {"content": text, "add_special": first, "parse_special": False}
        answer = self.wire.post("/tokenize", body)
        ids = answer.get("tokens") if isinstance(answer, dict) else None
        if not isinstance(ids, list) or not all(type(i) is int for i in ids):
            raise EndpointError(f"{self.wire.url}/tokenize: answers no list of tokens")
        return list(ids)

    def learn(self, sample: str) -> None:
        """Do nothing, because the server tokenizes."""

    def run(
        self,
        prompt: Sequence[Token],
        params: SamplingParams,
        *,
        reuse: bool,
        thinks: bool,
        on_token: Callable[[], None],
    ) -> tuple[Run, list[Token]]:
        body = {
            "prompt": list(prompt),
            "n_predict": params.max_tokens,
            "stream": True,
            "return_tokens": True,
            "cache_prompt": reuse,
            "ignore_eos": params.ignore_eos,
            "seed": params.seed,
            **_sampling(params, "repeat_penalty", "repeat_last_n", "top_k", "min_p"),
        }
        came = Arrivals(perf_counter())
        text, ids, last = "", list[Token](), None
        for at, event in self.wire.events("/completion", body):
            stop = event.get("stop") is True
            said = count(event, "tokens_predicted")
            came.add(at, (not stop) if said is None else said - came.n)
            self._expect_at_most(params.max_tokens, came.n)
            text += words(event, "content")
            tokens = event.get("tokens")
            ids += [t for t in tokens if type(t) is int] if isinstance(tokens, list) else []
            on_token()
            if stop:
                last = event
                break
        total = perf_counter() - came.began
        if last is None:
            raise EndpointError(f"{self.wire.url}: the stream ended before its last event")
        run = timed(came, last.get("timings"), total)
        cached = count(last.get("timings"), "cache_n")
        n_prompt = count(last, "tokens_evaluated") or len(prompt)
        computed = count(last.get("timings"), "prompt_n")
        if cached is not None or computed is not None:
            run.cached_tokens = n_prompt - (computed or 0) if cached is None else cached
        run.prompt_tokens = n_prompt - run.cached_tokens
        if n_prompt != len(prompt):
            raise EndpointError(
                f"{self.wire.url}: took {n_prompt} of the prompt's {len(prompt)} tokens"
            )
        cut = last.get("truncated") is True
        run.stop_reason = "context" if cut else STOPS.get(words(last, "stop_type"), "")
        answers.note(run, text, params.max_tokens or run.generated_tokens)
        # The server does not stream all tokens inside a character. Then tokenize the text.
        return run, ids if len(ids) == run.generated_tokens else self.encode(text, False)


class OpenAIServer(Endpoint):
    """`/v1/completions` or `/v1/chat/completions`: takes text, and counts its tokens."""

    caches = True

    def __init__(self, wire: Wire, name: str, n_ctx: int | None) -> None:
        super().__init__(wire, name, "", n_ctx)
        self.path = "/v1/completions"
        self._extended = True
        self._chars, self._overhead = 4.0, 0
        self.options = {"api": self.path}

    def learn(self, sample: str) -> None:
        """Find out which API answers, which fields it accepts, and its characters per token."""
        counts: list[int | None] = []
        for size in SAMPLES:
            answer = self._first(sample[:size]) if not counts else self._ask(sample[:size])
            counts.append(count(answer.get("usage"), "prompt_tokens"))
        short, long = counts
        if short is None or long is None or long <= short:
            raise EndpointError(
                f"{self.wire.url}: reports no usage.prompt_tokens, so prompts cannot be counted"
            )
        self._chars = (SAMPLES[1] - SAMPLES[0]) / (long - short)
        self._overhead = max(0, round(short - SAMPLES[0] / self._chars))
        self.options = {"api": self.path, "extensions": self._extended}

    def _first(self, text: str) -> dict[str, Any]:
        """The first answer of one of the APIs, with all fields or with OpenAI's only."""
        refusal: HttpError | None = None
        for self.path in ("/v1/completions", "/v1/chat/completions"):
            for self._extended in (True, False):
                try:
                    return self._ask(text)
                except HttpError as failure:
                    if failure.status not in (400, 404, 405, 422, 501):
                        raise
                    refusal = refusal or failure
        assert refusal is not None
        raise refusal

    def _ask(self, text: str) -> dict[str, Any]:
        answer = self.wire.post(self.path, self._body([text], SamplingParams(max_tokens=1)))
        if not isinstance(answer, dict):
            raise EndpointError(f"{self.wire.url}{self.path}: answers no object")
        return answer

    def encode(self, text: str, first: bool) -> list[Token]:
        n = round(len(text) / self._chars)
        borders = [round(i * self._chars) for i in range(n)] + [len(text)]
        pieces: list[Token] = [text[a:b] for a, b in itertools.pairwise(borders)]
        blank: list[Token] = [""] * self._overhead  # tokens that the server adds: bos, a template
        return blank + pieces if first else pieces

    def _body(self, prompt: Sequence[Token], params: SamplingParams) -> dict[str, Any]:
        text = "".join(map(str, prompt))
        chat = self.path.endswith("/chat/completions")
        asked = {"messages": [{"role": "user", "content": text}]} if chat else {"prompt": text}
        body = {
            "model": self.name,
            **asked,
            "max_tokens": params.max_tokens,
            "seed": params.seed,
            **_sampling(params, "repeat_penalty", "top_k", "min_p"),
            "repetition_penalty": params.repeat_penalty,
            "ignore_eos": params.ignore_eos,
        }
        return {k: v for k, v in body.items() if self._extended or k not in EXTENSIONS}

    def run(
        self,
        prompt: Sequence[Token],
        params: SamplingParams,
        *,
        reuse: bool,
        thinks: bool,
        on_token: Callable[[], None],
    ) -> tuple[Run, list[Token]]:
        body = {
            **self._body(prompt, params),
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        began = perf_counter()
        # Count events with text, and all events with a choice. A token's text may be empty, as may
        # the text of an event that only begins or ends the answer.
        spoken, chosen = Arrivals(began), Arrivals(began)
        text, reason = "", ""
        usage: Any = None
        timings: Any = None
        for at, event in self.wire.events(self.path, body):
            usage = event.get("usage") or usage
            timings = event.get("timings") or timings
            choices = event.get("choices")
            choice = choices[0] if isinstance(choices, list) and choices else None
            if choice is None:
                continue
            delta = choice.get("delta") if isinstance(choice, dict) else None
            said = words(choice, "text") + "".join(
                words(delta, key) for key in ("reasoning_content", "reasoning", "content")
            )
            text += said
            spoken.add(at, 1 if said else 0)
            chosen.add(at, 1)
            self._expect_at_most(params.max_tokens, min(spoken.n, chosen.n - ENDS))
            reason = words(choice, "finish_reason") or reason
            on_token()
        total = perf_counter() - began
        if not spoken.n:
            raise EndpointError(f"{self.wire.url}: the stream ended without a token")
        n = count(usage, "completion_tokens")
        if n is not None and n > (params.max_tokens or n):
            n = None
        came = chosen if n == chosen.n != spoken.n else spoken
        run = timed(came, timings, total, n)
        asked = count(usage, "prompt_tokens")
        details = usage.get("prompt_tokens_details") if isinstance(usage, dict) else None
        run.cached_tokens = count(details, "cached_tokens") or 0
        run.prompt_tokens = (len(prompt) if asked is None else asked) - run.cached_tokens
        run.stop_reason = reason
        answers.note(run, text, params.max_tokens or run.generated_tokens)
        return run, [text]


def connect(
    url: str,
    *,
    model: str | None = None,
    api_key: str | None = None,
    seconds: float = 600.0,
    sha: bool = True,
    progress: Progress = silent,
) -> LlamaServer | OpenAIServer:
    """Connect to the server at `url`, and find out its kind. EndpointError if none answers.

    model: needed if the server has several models. seconds: how long it may be silent.
    sha: hash the model file, if the server runs on this machine.
    """
    wire = Wire(url, api_key, seconds)
    props = _props(wire)
    if props is None:
        return OpenAIServer(wire, *_model(wire, model))
    path = words(props, "model_path")
    build = words(props, "build_info")
    n_ctx = count(props.get("default_generation_settings"), "n_ctx")
    name = model or Path(words(props, "model_alias") or path or "model").name
    server = LlamaServer(wire, name, f"llama-server {build}".strip(), n_ctx or None)
    server.options = {"slots": count(props, "total_slots")}
    if server.local and path and Path(path).is_file():
        try:
            server.serves(Path(path), sha=sha, progress=progress)
        except DesksideError:
            server.files = []  # deskside cannot read this model, so there is no ceiling
    return server


def _props(wire: Wire) -> dict[str, Any] | None:
    """The properties that llama-server reports; None from another server."""
    try:
        props = wire.get("/props")
    except HttpError as failure:
        if failure.status == 503:
            raise EndpointError(f"{failure}; try again when its model is loaded") from None
        return None
    except EndpointError as failure:
        if "answers no JSON" in str(failure):
            return None
        raise
    known = isinstance(props, dict) and "default_generation_settings" in props
    return props if known else None


def _model(wire: Wire, name: str | None) -> tuple[str, int | None]:
    """Name of the model to ask for, and its context in tokens; None if unknown."""
    try:
        answer = wire.get("/v1/models")
    except HttpError as failure:
        if name is not None and failure.status in (404, 405, 501):
            return name, None  # servers need not list their models
        raise
    listed = answer.get("data") if isinstance(answer, dict) else None
    models = {words(m, "id"): m for m in listed} if isinstance(listed, list) else {}
    if name is None and len(models) != 1:
        there = ", ".join(models) or "nothing"
        raise DesksideError(f"{wire.url} lists {there[:300]}: name one with --endpoint-model")
    name = name or next(iter(models))
    entry = models.get(name)
    for data in (entry, entry.get("meta") if isinstance(entry, dict) else None):
        for key in ("max_model_len", "context_length", "n_ctx"):
            if found := count(data, key):
                return name, found
    return name, None


def is_local(host: str) -> bool:
    """Whether the name of a URL's host means this machine."""
    return host in ("localhost", "::1", socket.gethostname()) or host.startswith("127.")


def _sampling(params: SamplingParams, *more: str) -> dict[str, Any]:
    names = ("temperature", "top_p", "presence_penalty", "frequency_penalty", *more)
    return {name: getattr(params, name) for name in names}


def is_url(text: str) -> bool:
    return urlsplit(text).scheme in ("http", "https")
