"""HTTP client for an endpoint: requests and server-sent events. Each failure is one clear line."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from deskside.errors import DesksideError
from deskside.machine.loopback import is_loopback

if TYPE_CHECKING:
    import httpx

CONNECT_SECONDS = 10.0
# Bytes. llama-server's last event repeats the prompt, so events can be long.
LONGEST_LINE = 64 << 20
LONGEST_BODY = 64 << 20
SHOWN = 200  # characters of a server's answer to show in an error


class EndpointError(DesksideError):
    """A request to the endpoint failed."""


class HttpError(EndpointError):
    """The endpoint answered with an HTTP error. `status` is its code."""

    def __init__(self, text: str, status: int) -> None:
        super().__init__(text)
        self.status = status


class Wire:
    """Sends requests to the server at `url`, which may end in /v1.

    seconds: how long the server may be silent, prefill included. DesksideError for a bad URL.
    """

    def __init__(self, url: str, api_key: str | None = None, seconds: float = 600.0) -> None:
        try:
            import httpx
        except ImportError:
            raise DesksideError("--endpoint needs: pip install 'deskside[bench]'") from None
        self.url = url.rstrip("/").removesuffix("/v1").rstrip("/")
        self._seconds = seconds
        try:
            parsed = httpx.URL(self.url)
            if parsed.userinfo or parsed.query:  # records store the URL
                raise DesksideError(
                    "--endpoint: the record stores this URL, so a name, password or key must not "
                    "be in it; use --api-key"
                )
            if parsed.scheme not in ("http", "https") or not parsed.host:
                raise httpx.InvalidURL("expected http://HOST:PORT")
            self.host = parsed.host
        except (httpx.InvalidURL, UnicodeEncodeError) as failure:
            raise DesksideError(f"--endpoint {url}: {failure}") from None
        try:
            self._client = httpx.Client(
                headers={"Authorization": f"Bearer {api_key}"} if api_key else {},
                timeout=httpx.Timeout(seconds, connect=CONNECT_SECONDS),
                trust_env=not is_loopback(self.host),  # a proxy leads elsewhere
            )
        except UnicodeEncodeError:
            raise DesksideError("--api-key: holds more than ASCII") from None
        except (httpx.InvalidURL, ValueError, ImportError, OSError) as failure:
            raise DesksideError(
                f"--endpoint {url}: a proxy or certificate of the environment ({_proxies()}) "
                f"cannot be used: {' '.join(str(failure).split())}"
            ) from None
        self._failures = httpx.HTTPError, httpx.InvalidURL, httpx.StreamError

    def get(self, path: str) -> Any:
        """The JSON at `path`. HttpError; EndpointError if no answer comes or it is not JSON."""
        return self._request("GET", path, None)

    def post(self, path: str, body: Mapping[str, Any]) -> Any:
        """Send `body` as JSON. Returns the JSON of the answer; errors as in `get`."""
        return self._request("POST", path, body)

    def _request(self, method: str, path: str, body: Mapping[str, Any] | None) -> Any:
        try:
            with self._client.stream(method, self.url + path, json=body) as response:
                data = self._body(response)
                self._raise_for(response, data)
        except self._failures as failure:
            raise self._error(failure) from None
        try:
            return json.loads(data)
        except (ValueError, RecursionError):
            raise EndpointError(f"{self.url}{path}: answers no JSON: {_shown(data)}") from None

    def events(self, path: str, body: Mapping[str, Any]) -> Iterator[tuple[float, dict[str, Any]]]:
        """Send `body` as JSON, and yield the server-sent events of the answer.

        Yields (`time.perf_counter()` at arrival, JSON object), up to [DONE] or the stream's end.
        EndpointError for an event that reports an error or is not JSON.
        """
        try:
            with self._client.stream("POST", self.url + path, json=body) as response:
                if response.status_code >= 400:
                    self._raise_for(response, self._body(response))
                for at, line in self._lines(response):
                    name, colon, value = line.partition(b":")
                    if name == b"error" and colon:  # older llama-server
                        raise EndpointError(f"{self.url}: {_message(value)}")
                    if name != b"data" or not colon:
                        if line and name not in (b"event", b"id", b"retry", b""):
                            raise EndpointError(f"{self.url}: streams garbage: {_shown(line)}")
                        continue
                    if value.strip() == b"[DONE]":
                        return
                    yield at, self._event(value)
        except self._failures as failure:
            raise self._error(failure) from None

    def _lines(self, response: httpx.Response) -> Iterator[tuple[float, bytes]]:
        held = b""
        for data in response.iter_bytes():
            at = time.perf_counter()
            *lines, held = (held + data).split(b"\n")
            for line in lines:
                yield at, line.rstrip(b"\r")
            if len(held) > LONGEST_LINE:
                raise EndpointError(f"{self.url}: streams garbage: a line without end")
        if held.strip():
            yield time.perf_counter(), held.rstrip(b"\r")

    def _event(self, value: bytes) -> dict[str, Any]:
        try:
            event = json.loads(value)
        except (ValueError, RecursionError):
            raise EndpointError(f"{self.url}: streams garbage: {_shown(value)}") from None
        if not isinstance(event, dict):
            raise EndpointError(f"{self.url}: streams garbage: {_shown(value)}")
        if event.get("error"):
            raise EndpointError(f"{self.url}: {_message(value)}")
        return event

    def _body(self, response: httpx.Response) -> bytes:
        data = b""
        for piece in response.iter_bytes():
            data += piece
            if len(data) > LONGEST_BODY:
                raise EndpointError(f"{self.url}: answers without end")
        return data

    def _raise_for(self, response: httpx.Response, data: bytes) -> None:
        if response.status_code >= 300:
            text = f"{self.url}: HTTP {response.status_code}: {_message(data)}"
            raise HttpError(text, response.status_code)

    def _error(self, failure: Exception) -> EndpointError:
        import httpx

        match failure:
            case httpx.ConnectError() | httpx.ConnectTimeout():
                reason = f"cannot connect ({failure}); is the server running?"
            case httpx.TimeoutException():
                reason = f"was silent for {self._seconds:.0f} s; --timeout allows more"
            case httpx.RemoteProtocolError() | httpx.ReadError() | httpx.WriteError():
                reason = f"closed the connection before the answer ended ({failure})"
            case _:
                reason = str(failure) or type(failure).__name__
        return EndpointError(f"{self.url}: {reason}")

    def close(self) -> None:
        self._client.close()


def _proxies() -> str:
    """The variables that httpx read."""
    names = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", "SSL_CERT_FILE", "SSL_CERT_DIR")
    found = {name.upper() for name, value in os.environ.items() if name.upper() in names and value}
    return ", ".join(sorted(found)) or "none is set"


def number(data: Any, key: str) -> float | None:
    """`data[key]` if that is a finite number >= 0, else None. data: any JSON."""
    value = data.get(key) if isinstance(data, dict) else None
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) and value >= 0 else None


def count(data: Any, key: str) -> int | None:
    """`data[key]` if that is a whole number >= 0, else None. data: any JSON."""
    value = number(data, key)
    return int(value) if value is not None and value == int(value) else None


def words(data: Any, key: str) -> str:
    """`data[key]` as valid Unicode if that is text, else "". data: any JSON."""
    value = data.get(key) if isinstance(data, dict) else None
    return value.encode("utf-8", "replace").decode() if isinstance(value, str) else ""


def _message(data: bytes) -> str:
    """The message in an error's body, as one line."""
    try:
        body = json.loads(data)
    except (ValueError, RecursionError):
        return _shown(data)
    for key in ("error", "detail", "message"):
        if isinstance(body, dict) and key in body:
            body = body[key]
    return _shown(body.encode("utf-8", "replace") if isinstance(body, str) else data)


def _shown(data: bytes) -> str:
    text = " ".join(data[: 4 * SHOWN].decode("utf-8", "replace").split())
    return (text[:SHOWN] + "…" if len(text) > SHOWN else text) or "nothing"
