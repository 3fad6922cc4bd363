"""Models of a hub: which one is meant, downloads whole or not at all, the cache, headers alone."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from huggingface_hub import close_session, constants, hf_hub_download, try_to_load_from_cache
from huggingface_hub.utils import WeakFileLock
from hypothesis import given
from hypothesis import strategies as st

from deskside.convert import hub_http
from deskside.convert.hub import cached, find
from deskside.convert.hub_choice import choose, quant_of
from deskside.convert.hub_http import HubFile
from deskside.errors import DesksideError
from deskside.gguf import GGUF, TensorInfo
from deskside.gguf.writer import GGUFWriter
from tests.commands import command
from tests.hub_server import COMMIT, Hub, Repo, etag, serving
from tests.models import tiny

REPO = "user/Model-GGUF"
QUANTS = ("BF16", "IQ4_XS", "Q4_K_M", "Q8_0", "UD-Q4_K_M")


@cache
def noise(seed: int, nbytes: int = 3_000_000) -> bytes:
    return random.Random(seed).randbytes(nbytes)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A hub, an empty cache, no token, no waiting between tries."""
    with serving(Hub()) as server:
        server.repos[REPO] = Repo({f"Model-{q}.gguf": noise(i) for i, q in enumerate(QUANTS)})
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        url = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.setattr(hub_http, "PAUSE", 0.0)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        monkeypatch.setenv("no_proxy", "")
        yield server
        close_session()


def refused(spec: str, *parts: str, file: str | None = None) -> None:
    with pytest.raises(DesksideError) as caught:
        find(spec, file).fetch()
    assert "\n" not in str(caught.value)
    for part in parts:
        assert part in str(caught.value)


def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def left(tmp_path: Path) -> list[str]:
    """Names of what lies in the cache, beside locks."""
    files = (p for p in (tmp_path / "hub").rglob("*") if p.is_symlink() or p.is_file())
    return sorted(p.name for p in files if ".locks" not in p.parts)


# -- which model


def files_of(*names: str) -> list[HubFile]:
    return [HubFile("", REPO, COMMIT, name, 10**9, "") for name in names]


@pytest.mark.parametrize(
    ("names", "quant", "chosen"),
    [
        (("M-Q8_0.gguf", "M-Q4_K_M.gguf", "M-BF16.gguf"), None, "M-Q4_K_M.gguf"),
        (("M-Q8_0.gguf", "M-BF16.gguf"), None, "M-Q8_0.gguf"),
        (("M-IQ4_KSS.gguf", "M-BF16.gguf", "mmproj-F16.gguf"), None, "M-BF16.gguf"),
        (("a-mmproj-Q4_K_M.gguf", "mtp-M-Q4_K_M.gguf", "M-BF16.gguf"), None, "M-BF16.gguf"),
        (("M-Q4_K_M.gguf", "M-UD-Q4_K_M.gguf"), "q4_k_m", "M-Q4_K_M.gguf"),
        (("M-Q4_K_M.gguf", "M-UD-Q4_K_M.gguf"), "UD-Q4_K_M", "M-UD-Q4_K_M.gguf"),
        (("M-IQ4_KSS.gguf", "M-smol-IQ4_KSS.gguf"), "IQ4_KSS", "M-IQ4_KSS.gguf"),
        (("M-Q5_K_M-Q4_K_M.gguf", "M-Q5_K_M.gguf"), "Q5_K_M", "M-Q5_K_M.gguf"),
        (("M-Q4_K_S.gguf", "M.Q4_K_M.gguf"), "Q4_K_M", "M.Q4_K_M.gguf"),
        (("Q4_K_M/M.gguf", "M-Q2_K.gguf"), "Q2_K", "M-Q2_K.gguf"),
    ],
)
def test_the_quant_in_the_name_decides(
    names: tuple[str, ...], quant: str | None, chosen: str
) -> None:
    assert [f.name for f in choose(files_of(*names), REPO, quant)] == [chosen]


@pytest.mark.parametrize(
    ("names", "quant", "file", "says"),
    [
        (("M-Q8_0.gguf", "M-IQ4_XS.gguf"), "Q4_K_M", None, "has no model with Q4_K_M in its name; "
         "it has IQ4_XS (1.0 GB), Q8_0 (1.0 GB)"),
        (("A-Q8_0.gguf", "B-Q8_0.gguf"), "Q8_0", None, "A-Q8_0.gguf (1.0 GB), B-Q8_0.gguf"),
        (("A-Q8_0.gguf", "B-Q8_0.gguf"), None, None, "name one with -hff"),
        (("M-Q8_0.gguf",), None, "M-Q4_0.gguf", "has no M-Q4_0.gguf; it has Q8_0"),
        (("mmproj-F16.gguf",), None, None, "has no GGUF file of a model"),
        ((), None, "a.gguf", "has no GGUF file of a model"),
        (("M-Q8_0-00001-of-00003.gguf", "M-Q8_0-00003-of-00003.gguf"), None, None,
         "has 2 of the 3"),
        (("a/M-Q8_0.gguf", "b/M-Q8_0.gguf"), None, "M-Q8_0.gguf", "several are meant"),
    ],
)  # fmt: skip
def test_what_is_not_one_model_lists_what_there_is(
    names: tuple[str, ...], quant: str | None, file: str | None, says: str
) -> None:
    with pytest.raises(DesksideError) as caught:
        choose(files_of(*names), REPO, quant, file)
    assert says in str(caught.value)


def test_a_shard_means_all_shards() -> None:
    shards = [f"IQ4_KSS/M-IQ4_KSS-{i:05}-of-00003.gguf" for i in (1, 2, 3)]
    files = files_of(shards[2], shards[0], "M-Q8_0.gguf", shards[1])
    for quant, file in (("IQ4_KSS", None), (None, shards[1]), (None, Path(shards[2]).name)):
        assert [f.name for f in choose(files, REPO, quant, file)] == shards


@given(st.lists(st.sampled_from(QUANTS), min_size=1, unique=True), st.sampled_from(QUANTS))
def test_a_quant_finds_its_file_or_says_which_there_are(has: list[str], asked: str) -> None:
    files = files_of(*(f"M-{q}.gguf" for q in has))
    if asked in has:
        assert [quant_of(f.name) for f in choose(files, REPO, asked)] == [asked]
    elif f"UD-{asked}" in has:  # as llama.cpp: the name need only end with it
        assert [quant_of(f.name) for f in choose(files, REPO, asked)] == [f"UD-{asked}"]
    else:
        with pytest.raises(DesksideError) as caught:
            choose(files, REPO, asked)
        assert all(f"{q} (" in str(caught.value) for q in has)


@pytest.mark.parametrize("spec", ["model", "a/b/c", "a/b:", "/b", "a/../b", "a/b:Q4 K", "a--b/c"])
def test_a_wrong_name_is_refused(hub: Hub, spec: str) -> None:
    refused(spec, spec.split(":")[0], "USER/REPO[:QUANT]")


# -- downloads


def test_a_model_is_fetched_once_and_others_find_it(hub: Hub, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    path = find(REPO).fetch(progress=lambda label, done, total: seen.append((done, total)))
    data = hub.repos[REPO].files["Model-Q4_K_M.gguf"]
    assert path.read_bytes() == data
    assert seen == sorted(seen) and seen[-1] == (len(data), len(data))
    cache = tmp_path / "hub"
    assert try_to_load_from_cache(REPO, path.name, cache_dir=cache) == str(path)
    before = len(hub.sent())
    assert find(REPO).fetch() == path
    assert hf_hub_download(REPO, path.name, cache_dir=cache) == str(path)
    assert len(hub.sent()) == before


def test_what_others_fetched_is_found(hub: Hub, tmp_path: Path) -> None:
    name = "Model-Q8_0.gguf"
    there = hf_hub_download(REPO, name, cache_dir=tmp_path / "hub")
    before = len(hub.sent())
    assert str(find(f"{REPO}:Q8_0").fetch()) == there and len(hub.sent()) == before


def test_a_new_commit_fetches_only_what_changed(hub: Hub) -> None:
    old = find(REPO).fetch()
    repo = hub.repos[REPO]
    repo.commit = "f" * 40
    before = len(hub.sent())
    new = find(REPO).fetch()
    assert new.parent.name == "f" * 40 and new.resolve() == old.resolve()
    assert len(hub.sent()) == before
    repo.commit, repo.files["Model-Q4_K_M.gguf"] = "e" * 40, noise(99)
    assert find(REPO).fetch().read_bytes() == noise(99)


def test_files_in_git_itself_have_its_checksum(hub: Hub) -> None:
    repo = hub.repos[REPO]
    repo.small.add("Model-BF16.gguf")
    path = find(f"{REPO}:BF16").fetch()
    assert path.resolve().name == etag(repo, "Model-BF16.gguf")
    repo.small.add("Model-Q8_0.gguf")
    repo.sent["Model-Q8_0.gguf"] = noise(77)
    refused(f"{REPO}:Q8_0", "checksum")


def test_all_shards_are_fetched(hub: Hub) -> None:
    names = [f"x/M-Q8_0-{i:05}-of-00003.gguf" for i in (1, 2, 3)]
    # Two of the same bytes are one blob.
    hub.repos["user/split"] = Repo(dict(zip(names, map(noise, (1, 2, 1)), strict=True)))
    seen: list[tuple[int, int]] = []
    path = find("user/split").fetch(progress=lambda _, done, total: seen.append((done, total)))
    assert [path.with_name(Path(n).name).read_bytes() for n in names] == [*map(noise, (1, 2, 1))]
    assert seen == sorted(seen) and seen[-1] == (6_000_000, 6_000_000)


def test_a_broken_connection_goes_on_where_it_broke(hub: Hub) -> None:
    said: list[str] = []
    hub.cuts = [1_500_000, 0, 700_000, 10]
    path = find(REPO).fetch(said.append)
    assert path.read_bytes() == hub.repos[REPO].files["Model-Q4_K_M.gguf"]
    starts = [int((r.range or "=0-").split("=")[1].split("-")[0]) for r in hub.sent()]
    assert len(starts) == 5 and starts == sorted(starts) and starts[-1] >= 1_000_000
    assert sum("trying again" in line for line in said) == 4


def test_what_came_before_an_end_is_gone_on_with(hub: Hub, tmp_path: Path) -> None:
    hub.cuts = [1_500_000] + [0] * hub_http.TRIES
    refused(REPO, "Model-Q4_K_M.gguf", "gave up at byte", "goes on from there")
    assert [name.endswith(".incomplete") for name in left(tmp_path)] == [True]
    hub.requests.clear()
    hub.cuts = []
    path = find(REPO).fetch()
    assert path.read_bytes() == hub.repos[REPO].files["Model-Q4_K_M.gguf"]
    (request,) = hub.sent()
    assert request.range is not None and not request.range.startswith("bytes=0-")


def test_an_unreachable_hub_is_given_up(hub: Hub) -> None:
    model = find(REPO)
    hub.statuses = [503] * hub_http.TRIES
    with pytest.raises(DesksideError, match="status 503; gave up at byte 0"):
        model.fetch()
    hub.statuses = [503, 429]
    assert model.fetch().is_file()


@pytest.mark.parametrize("seed", range(6))
def test_whatever_breaks_the_file_is_whole_or_goes_on(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, seed: int
) -> None:
    rng = random.Random(seed)
    monkeypatch.setattr(hub_http, "PIECE", rng.randrange(300_000, 4_000_000))
    monkeypatch.setattr(hub_http, "CHUNK", rng.randrange(50_000, 1_000_000))
    hub.ranges = rng.random() < 0.8
    hub.cuts = [rng.choice((0, rng.randrange(4_000_000))) for _ in range(30)]
    hub.statuses = [rng.choice((500, 502, 503, 429)) for _ in range(rng.randrange(4))]
    data = hub.repos[REPO].files["Model-Q4_K_M.gguf"]
    for _ in range(40):
        try:
            path = find(REPO).fetch()
            break
        except DesksideError as error:
            assert "gave up" in str(error)
            assert all(name.endswith(".incomplete") for name in left(tmp_path))
    assert path.read_bytes() == data


@pytest.mark.parametrize("chunked", [False, True])
def test_a_server_without_ranges_starts_again(hub: Hub, chunked: bool) -> None:
    hub.ranges, hub.chunked = False, chunked
    hub.cuts = [1_500_000]
    assert find(REPO).fetch().read_bytes() == hub.repos[REPO].files["Model-Q4_K_M.gguf"]


def test_pieces_make_one_file(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_http, "PIECE", 1_000_001)
    assert find(REPO).fetch().read_bytes() == hub.repos[REPO].files["Model-Q4_K_M.gguf"]
    assert len(hub.sent()) == 3


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("ranges", [False, True])
@pytest.mark.parametrize("size", [2_999_999, 3_000_001, 3_000_000])
def test_other_bytes_than_listed_are_never_taken(
    hub: Hub, tmp_path: Path, size: int, ranges: bool, chunked: bool
) -> None:
    hub.ranges, hub.chunked = ranges, chunked
    repo = hub.repos[REPO]
    repo.sent["Model-Q4_K_M.gguf"] = noise(77, size)
    refused(REPO, "Model-Q4_K_M.gguf")
    assert not [name for name in left(tmp_path) if not name.endswith(".incomplete")]
    repo.sent.clear()
    # What an honest hub sends afterwards is taken, whatever the liar left.
    for _ in range(2):
        try:
            path = find(REPO).fetch()
        except DesksideError as error:
            assert "checksum" in str(error)
    assert path.read_bytes() == repo.files["Model-Q4_K_M.gguf"]


def test_other_ranges_than_asked_for_are_refused(hub: Hub) -> None:
    hub.skip = 100
    refused(REPO, "sends other bytes than it is asked for")
    with pytest.raises(DesksideError, match="other bytes"):
        find(REPO).header()
    hub.skip = 0
    assert find(REPO).fetch().is_file()


def test_a_wrong_checksum_leaves_nothing(hub: Hub, tmp_path: Path) -> None:
    hub.repos[REPO].sent["Model-Q4_K_M.gguf"] = noise(77)
    refused(REPO, "Model-Q4_K_M.gguf: its checksum is", "the hub lists", "fetch it again")
    assert left(tmp_path) == []


def test_a_damaged_rest_is_refused_and_removed(hub: Hub, tmp_path: Path) -> None:
    model = find(REPO)
    blobs = model.folder / "blobs"
    blobs.mkdir(parents=True)
    rest = blobs / f"{model.files[0].etag}.incomplete"
    rest.write_bytes(b"x" * 1000)
    refused(REPO, "checksum")
    assert left(tmp_path) == []
    rest.write_bytes(noise(1, 4_000_000))  # longer than the file
    assert model.fetch().is_file()


def test_a_full_disk_is_told_before_the_download(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=2_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    refused(REPO, str(tmp_path / "hub"), "takes 3.0 MB", "2.0 MB free", "HF_HUB_CACHE")
    assert left(tmp_path) == [] and hub.sent() == []


def test_a_disk_that_fills_up_is_told(hub: Hub, tmp_path: Path) -> None:
    """A limit on the size of files stands in for the disk's."""
    code = (
        "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, 2_000_000))\n"
        "from deskside.convert.hub import find; from deskside.errors import DesksideError\n"
        f"try: find('{REPO}').fetch()\n"
        "except DesksideError as error: print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(hub, tmp_path), capture_output=True, text=True
    )
    assert done.stderr == "" and done.stdout.endswith("cannot be written: File too large\n")
    assert find(REPO).fetch().is_file()


def environment(hub: Hub, tmp_path: Path) -> dict[str, str]:
    cache = str(tmp_path / "hub")
    return {**os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_CACHE": cache, "HF_HOME": str(tmp_path)}


def test_a_folder_that_cannot_be_written_is_named(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "plain").write_text("")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "plain" / "hub"))
    refused(REPO, str(tmp_path / "plain"), "cannot be written: Not a directory")


def test_a_file_system_without_links_gets_the_file(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "symlink", never)
    path = find(REPO).fetch()
    assert path.is_file() and not path.is_symlink()
    before = len(hub.sent())
    assert find(REPO).fetch() == path and len(hub.sent()) == before


def test_another_process_is_waited_for(hub: Hub) -> None:
    model, said = find(REPO), []
    (file,) = model.files
    lock = model.folder.parent / ".locks" / model.folder.name / f"{file.etag}.lock"
    lock.parent.mkdir(parents=True)
    waits = threading.Event()

    def say(line: str) -> None:
        said.append(line)
        if "waiting" in line:
            waits.set()

    with WeakFileLock(lock):
        thread = threading.Thread(target=model.fetch, args=(say,))
        thread.start()
        assert waits.wait(20)
        assert not model.path.exists()
    thread.join()
    assert model.path.is_file()


# -- who may, and what is not there


def test_a_missing_repo_is_told(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    refused("user/none", "user/none", hub.url, "no such repo", "HF_TOKEN")
    monkeypatch.setenv("HF_TOKEN", hub.token)
    refused("user/none", "no such repo")


def test_a_private_repo_needs_a_token(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.repos[REPO].private = True
    refused(REPO, "private", "HF_TOKEN")
    monkeypatch.setenv("HF_TOKEN", hub.token)
    assert find(REPO).fetch().is_file()
    # The host that the hub sends a client to never sees it.
    assert hub.sent("/api/")[-1].token == hub.token
    assert hub.sent() and all(r.token is None for r in hub.sent())


def test_a_gated_repo_says_what_to_do(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.repos[REPO].gated = True
    refused(REPO, f"gated: accept the terms on {hub.url}/{REPO}", "HF_TOKEN")
    with pytest.raises(DesksideError, match="gated"):
        find(REPO).header()
    monkeypatch.setenv("HF_TOKEN", hub.token)  # of an account that has not accepted
    refused(REPO, "gated: accept the terms", "HF_TOKEN")
    monkeypatch.setenv("HF_TOKEN", hub.granted)
    assert find(REPO).fetch().is_file()


def test_a_wrong_token_is_told(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    refused(REPO, "refuses the token", "HF_TOKEN")


def test_a_file_that_is_gone_is_told(hub: Hub) -> None:
    model = find(REPO)
    del hub.repos[REPO].files["Model-Q4_K_M.gguf"]
    with pytest.raises(DesksideError, match=r"Model-Q4_K_M.gguf: .* has no such file"):
        model.fetch()


@pytest.mark.parametrize(
    "info",
    [
        b"<html>",
        b"[]",
        b"{}",
        b'{"id": "a", "sha": "../../x", "siblings": []}',
        b'{"id": "a", "sha": "%s", "siblings": [{"rfilename": "M.gguf"}]}' % COMMIT.encode(),
        b'{"id": "a", "sha": "%s", "siblings": [{"rfilename": "M.gguf", "size": 3, "blobId": "../x"'
        b"}]}" % COMMIT.encode(),
    ],
)
def test_what_is_no_hub_is_told(hub: Hub, tmp_path: Path, info: bytes) -> None:
    hub.info = info
    refused(REPO, "does not answer as a hub", "HF_ENDPOINT")
    assert left(tmp_path) == []


def test_names_that_lead_out_of_the_cache_are_left_out(hub: Hub) -> None:
    repo = hub.repos[REPO]
    repo.files = {"../../M-Q4_K_M.gguf": b"", "/etc/M-Q8_0.gguf": b"", "M-BF16.gguf": noise(1)}
    assert [f.name for f in find(REPO).files] == ["M-BF16.gguf"]


# -- the cache


def test_offline_takes_what_the_cache_has(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    q8 = find(f"{REPO}:Q8_0").fetch()
    hub.repos[REPO].commit = "f" * 40
    q4 = find(REPO).fetch()
    offline(monkeypatch)
    hub.requests.clear()
    assert find(REPO).fetch() == q4
    assert find(f"{REPO}:Q8_0").fetch() == q8  # of an older commit
    assert find(REPO, "Model-Q8_0.gguf").fetch() == q8
    refused(f"{REPO}:BF16", "in the cache", "has no model with BF16", "Q4_K_M", "HF_HUB_OFFLINE")
    refused("user/none", "user/none: is not in the cache", "HF_HUB_OFFLINE is set")
    assert hub.requests == []


def test_a_hub_that_is_away_is_offline(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    path = find(REPO).fetch()
    said: list[str] = []
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert find(REPO, say=said.append).fetch() == path
    assert len(said) == 1 and "cannot be reached" in said[0]
    refused("user/none", "user/none", "http://127.0.0.1:9 cannot be reached")


def test_a_hub_that_fails_is_told(hub: Hub) -> None:
    path = find(REPO).fetch()
    hub.list_status = 503
    refused("user/none", f"{hub.url} answered 503: maintenance")
    assert find(REPO).fetch() == path  # from the cache
    hub.list_status = 418
    refused(REPO, "answered 418: maintenance")


def test_loopback_is_never_asked_through_a_proxy(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    close_session()
    assert find(REPO).fetch().is_file()


def test_the_cache_is_listed(hub: Hub, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, out, err = command(capsys, "list")
    assert (code, out) == (0, "") and "no GGUF model in" in err
    path = find(REPO).fetch()
    hub.repos[REPO].commit = "f" * 40
    newer = find(REPO).fetch()
    names = [f"x/M-{i:05}-of-00002.gguf" for i in (1, 2)]
    hub.repos["user/split"] = Repo(dict(zip(names, map(noise, (1, 2)), strict=True)))
    split = find("user/split")
    hub.cuts = [10**9, 1_500_000] + [0] * hub_http.TRIES
    with pytest.raises(DesksideError):
        split.fetch()
    models, unfinished = cached()
    assert [(m.repo, m.name, m.quant, m.nbytes, m.shards) for m in models] == [
        (REPO, path.name, "Q4_K_M", 3_000_000, (1, 1))  # once, though two commits have it
    ]
    assert models[0].path in (path, newer)
    assert unfinished.keys() == {"user/split"} and 0 < unfinished["user/split"] <= 1_500_000
    split.fetch()
    code, out, err = command(capsys, "list")
    assert code == 0 and err == ""
    assert f"{REPO}\n  Q4_K_M" in out and "3.0 MB" in out
    assert "x/M-00001-of-00002.gguf, 2 shards" in out
    assert str(split.path) in out


def test_a_cache_that_is_a_file_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "plain").write_text("")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "plain"))
    code, _, err = command(capsys, "list")
    assert code == 2 and str(tmp_path / "plain") in err and "HF_HUB_CACHE" in err


# -- headers alone


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """A small model in three shards, the first of which has keys alone."""
    folder, model = tmp_path_factory.mktemp("shards"), GGUF.open(tiny())
    infos = list(model.tensors.values())
    parts: tuple[list[TensorInfo], ...] = ([], infos[: len(infos) // 2], infos[len(infos) // 2 :])
    found = {}
    for no, part in enumerate(parts):
        keys = {**(model.typed_metadata() if no == 0 else {}), "split.no": no, "split.count": 3}
        path = folder / f"Tiny-Q4_K_M-{no + 1:05}-of-00003.gguf"
        with GGUFWriter(path, keys, [(t.name, t.type, t.shape) for t in part]) as out:
            for info in part:
                out.write(info.name, model.raw(info.name))
        found[f"Q4_K_M/{path.name}"] = path.read_bytes()
    return found


@pytest.mark.parametrize("ranges", [True, False])
def test_headers_are_read_without_the_data(
    hub: Hub,
    shards: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    ranges: bool,
) -> None:
    monkeypatch.setattr(hub_http, "FIRST", 1 << 12)
    monkeypatch.setattr(hub_http, "CHUNK", 1 << 12)
    hub.repos["user/tiny"], hub.ranges = Repo(shards), ranges
    hub.cuts = [100, 5000]
    model = find("user/tiny")
    header = model.header()
    whole = GGUF.open(tiny())
    assert {n: (t.type, t.shape) for n, t in header.tensors.items()} == {
        n: (t.type, t.shape) for n, t in whole.tensors.items()
    }
    assert header.path == model.path and left(tmp_path) == []
    if ranges:
        ends = [int(r.range.split("-")[1]) + 1 for r in hub.sent() if r.range]
        assert max(ends) < sum(map(len, shards.values())) / 4
    model.fetch()
    before = len(hub.sent())
    assert find("user/tiny").header().tensors.keys() == whole.tensors.keys()
    assert len(hub.sent()) == before


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda data: b"GGML" + data[4:], "user/tiny/M.gguf: this is not a GGUF file"),
        (lambda data: data[:100_000], "user/tiny/M.gguf: "),
        (lambda data: data[:-100], "user/tiny/M.gguf: its tensors end at byte"),
        (lambda data: data[:16] + b"\xff" * 8 + data[24:], "the number of keys is 18446744073709"),
    ],
)
def test_a_bad_header_is_refused_by_its_name(hub: Hub, change: object, says: str) -> None:
    assert callable(change)
    hub.repos["user/tiny"] = Repo({"M.gguf": change(tiny().read_bytes())})
    with pytest.raises(DesksideError) as caught:
        find("user/tiny").header()
    assert says in str(caught.value)


def test_an_endless_header_is_given_up(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_http, "FIRST", 1 << 10)
    monkeypatch.setattr(hub_http, "MOST", 1 << 16)
    data = tiny().read_bytes()
    hub.repos["user/tiny"] = Repo({"M.gguf": data[:16] + b"\xff" * 8 + data[24:]})
    with pytest.raises(DesksideError, match="the number of keys"):
        find("user/tiny").header()
    ends = [int(r.range.split("-")[1]) + 1 for r in hub.sent() if r.range]
    assert max(ends) == 1 << 16


# -- the command line


def test_plan_needs_the_headers_alone(
    hub: Hub, shards: dict[str, bytes], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    hub.repos["user/tiny"] = Repo(shards)
    words = ("--machine", "epyc-9175f-1x96gb", "--json")
    code, remote, err = command(capsys, "plan", "-hf", "user/tiny", *words)
    assert code == 0 and "in 3 shards; " in err and "to fetch" in err
    assert left(tmp_path) == []
    path = find("user/tiny").fetch()
    code, local, err = command(capsys, "plan", "-hf", "user/tiny", *words)
    assert code == 0 and "is in the cache" in err
    assert remote == local == command(capsys, "plan", "-m", str(path), *words)[1]
    emitted = command(capsys, "plan", "-hf", "user/tiny", "--emit", "llama-server", *words[:2])[1]
    assert str(path) in emitted


def test_run_bench_and_perplexity_fetch(
    hub: Hub, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    hub.repos["user/tiny"] = Repo({"T-Q8_0.gguf": tiny().read_bytes(), "T-BF16.gguf": b"no"})
    code, _, err = command(
        capsys, "run", "-hf", "user/tiny", "-hff", "T-Q8_0.gguf", "-p", "a", "-n", "2", "-c", "256"
    )
    assert code == 0 and "fetching user/tiny/T-Q8_0.gguf" in err
    text = tmp_path / "text"
    text.write_text("one two three " * 40)
    words = ("perplexity", str(text), "-hf", "user/tiny:q8_0", "-c", "64", "--chunks", "1")
    code, out, _ = command(capsys, *words)
    assert code == 0 and "PPL = " in out
    hub.requests.clear()
    bench = ("bench", "-hf", "user/tiny:BF16", "-w")
    code, _, err = command(capsys, *bench, "none")
    assert code == 2 and "none" in err and hub.sent() == []  # before any download
    code, _, err = command(capsys, *bench, "chat", "--out", str(tmp_path / "a.json"))
    assert code == 2 and "this is not a GGUF file" in err and len(hub.sent()) == 1


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("run", "-hff", "a.gguf", "-p", "a"), "give -hf USER/REPO"),
        (("run", "-m", "a.gguf", "-hf", REPO, "-p", "a"), "two models"),
        (("plan", "--preset", "tiny-moe", "-hf", REPO), "give one of them"),
        (("plan", "-hf", "user/none"), "no such repo"),
        (("bench", "-hf", REPO, "--preset", "tiny-moe"), "has no meaning with --preset"),
        (("bench", "-hf", REPO, "--endpoint", "http://127.0.0.1:9"), "compare them with --vs"),
    ],
)
def test_flags_that_make_no_sense_are_refused(
    hub: Hub, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], says: str
) -> None:
    code, _, err = command(capsys, *words)
    assert code == 2 and says in err and hub.sent() == []


def test_ctrl_c_keeps_what_came(hub: Hub, tmp_path: Path) -> None:
    """In a process of its own, by the variables of the hub."""
    hub.repos["user/tiny"] = Repo({"T.gguf": tiny().read_bytes()})
    started = threading.Event()
    hub.pause = started
    code = "import sys; sys.argv = ['deskside', 'run', '-hf', 'user/tiny', '-p', 'a'];"
    code += "from deskside.cli import main; main()"
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        env=environment(hub, tmp_path),
        stderr=subprocess.PIPE,
        text=True,
    )
    assert started.wait(60)
    blobs = tmp_path / "hub" / "models--user--tiny" / "blobs"
    until = time.monotonic() + 60
    while not any(p.stat().st_size for p in blobs.glob("*")) and time.monotonic() < until:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "the same command goes on" in err
    assert [name.endswith(".incomplete") for name in left(tmp_path)] == [True]
    hub.pause = None
    hub.requests.clear()
    assert find("user/tiny").fetch().read_bytes() == tiny().read_bytes()
    (request,) = hub.sent()
    assert request.range is not None and not request.range.startswith("bytes=0-")
    assert cached()[1] == {}


def test_the_command_line_starts_without_the_hub() -> None:
    code = (
        "import sys, deskside.cli.app;"
        "print({'huggingface_hub', 'httpx2', 'filelock'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "set()\n"
