"""The HTTP client beside a desktop's proxy variables."""

from __future__ import annotations

import pytest

from deskside.errors import DesksideError
from deskside.machine.loopback import is_loopback
from deskside.server.client import Wire
from tests.bench_servers import serving

UNUSABLE = {
    "HTTP_PROXY": "http://127.0.0.1:9",  # nobody listens
    "http_proxy": "http://127.0.0.1:9",
    "ALL_PROXY": "socks://127.0.0.1:7890/",  # as GNOME sets it
    "all_proxy": "socks5://127.0.0.1:7890",
    "NO_PROXY": "localhost,[::1]",
    "SSL_CERT_FILE": "/no/such/file",
}


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", "SSL_CERT_FILE"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)


@pytest.mark.parametrize("name", UNUSABLE)
@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_a_proxy_is_not_asked_for_this_machine(
    monkeypatch: pytest.MonkeyPatch, name: str, host: str
) -> None:
    monkeypatch.setenv(name, UNUSABLE[name])
    with serving("llama") as server:
        wire = Wire(server.url.replace("127.0.0.1", host), seconds=5)
        assert isinstance(wire.get("/props"), dict)
        wire.close()


@pytest.mark.parametrize("name", ["ALL_PROXY", "all_proxy", "NO_PROXY"])
def test_elsewhere_an_unusable_proxy_is_one_line(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv(name, UNUSABLE[name])
    with pytest.raises(
        DesksideError, match=f"environment .*{name.upper()}.* cannot be used"
    ) as caught:
        Wire("http://192.0.2.1:8080")
    assert "\n" not in str(caught.value)


def test_what_is_this_machine() -> None:
    own = ("localhost", "LocalHost.", "a.localhost", "127.0.0.1", "127.9.9.9", "::1", "[::1]")
    for host in (*own, "0.0.0.0", "::", "::ffff:127.0.0.1"):
        assert is_loopback(host), host
    for host in ("192.0.2.1", "localhost.example.com", "127.example.com", "::2", "", "10.0.0.1"):
        assert not is_loopback(host), host


def test_a_key_beyond_ascii_is_named() -> None:
    with pytest.raises(DesksideError, match="--api-key"):
        Wire("http://127.0.0.1:1", "ключ")
