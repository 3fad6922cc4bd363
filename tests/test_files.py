"""Outputs: whole or not at all, and only plain files are ever replaced."""

from __future__ import annotations

import os
import signal
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from deskside.errors import DesksideError
from deskside.files import WholeFile, write_all
from deskside.gguf import GGUF
from deskside.gguf.quants import BY_NAME
from deskside.gguf.writer import GGUFWriter

Write = Callable[[Path, bytes], None]


def in_pieces(path: Path, data: bytes) -> None:
    file = WholeFile(path)
    try:
        file.open()
        file.write(data[:3])
        file.write(data[3:])
        assert file.tell() == len(data)
        file.keep()
    finally:
        file.discard()


def at_once(path: Path, data: bytes) -> None:
    write_all({path: data.decode()})


WRITERS = pytest.mark.parametrize("write", [in_pieces, at_once])


@WRITERS
def test_a_plain_file_is_replaced_and_nothing_is_left(tmp_path: Path, write: Write) -> None:
    out = tmp_path / "out"
    for text in (b"first", b"second"):
        write(out, text)
        assert out.read_bytes() == text
        assert os.listdir(tmp_path) == ["out"]


@WRITERS
@pytest.mark.parametrize("exists", [True, False])
def test_a_link_stays_and_its_target_is_written(tmp_path: Path, write: Write, exists: bool) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if exists:
        (disk / "file").write_text("old")
    (tmp_path / "middle").symlink_to("disk/file")
    (tmp_path / "link").symlink_to(tmp_path / "middle")
    write(tmp_path / "link", b"new text")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "middle").is_symlink()
    assert (disk / "file").read_text() == "new text"
    assert os.listdir(disk) == ["file"]


@WRITERS
def test_a_pipe_gets_the_bytes_and_stays_one(tmp_path: Path, write: Write) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    got: list[bytes] = []
    reader = threading.Thread(target=lambda: got.append(pipe.read_bytes()))
    reader.start()
    write(pipe, b"through the pipe")
    reader.join(10)
    assert got == [b"through the pipe"]
    assert stat.S_ISFIFO(pipe.stat().st_mode)


@WRITERS
def test_a_device_takes_what_is_written(tmp_path: Path, write: Write) -> None:
    link = tmp_path / "null"
    link.symlink_to("/dev/null")
    for path in (Path("/dev/null"), link):
        write(path, b"nothing of it stays")
        assert stat.S_ISCHR(path.stat().st_mode)
    assert link.is_symlink()
    assert os.listdir(tmp_path) == ["null"]


@WRITERS
def test_folders_sockets_and_loops_are_refused(tmp_path: Path, write: Write) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "socket"))
        for name, why in (("folder", "a folder"), ("socket", "no plain file"), ("loop", "written")):
            with pytest.raises(DesksideError, match=why) as caught:
                write(tmp_path / name, b"text")
            assert str(tmp_path / name) in str(caught.value)
    assert sorted(os.listdir(tmp_path)) == ["folder", "loop", "socket"]


def test_a_model_goes_through_a_pipe_as_into_a_file(tmp_path: Path) -> None:
    data = np.arange(24, dtype=np.float32)

    def write(path: Path) -> None:
        with GGUFWriter(path, {"a": 1}, [("x", BY_NAME["F32"], (12, 2))]) as out:
            out.write("x", data)

    write(tmp_path / "file.gguf")
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    copy = tmp_path / "copy.gguf"
    reader = threading.Thread(target=lambda: copy.write_bytes(pipe.read_bytes()))
    reader.start()
    write(pipe)
    reader.join(10)
    assert copy.read_bytes() == (tmp_path / "file.gguf").read_bytes()
    assert GGUF.open(copy).dequantized("x").tolist() == data.reshape(2, 12).tolist()


def test_the_disk_is_asked_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out.gguf"
    out.write_bytes(b"what was there")
    writer = GGUFWriter(out, {}, [("x", BY_NAME["F32"], (1024, 1024))], advice="take less")
    assert writer.nbytes == writer.nbytes // 32 * 32 >= 1 << 22
    usage = type("Usage", (), {"free": writer.nbytes - 1})
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    with (
        pytest.raises(DesksideError, match=r"needs 4\.2 MB, the disk has 4\.2 MB free; take less"),
        writer,
    ):
        pass
    assert os.listdir(tmp_path) == ["out.gguf"]
    assert out.read_bytes() == b"what was there"
    with GGUFWriter("/dev/null", {}, [("x", BY_NAME["F32"], (1024, 1024))]) as null:
        null.write("x", np.zeros(1 << 20, np.float32))


def test_the_promised_size_is_the_files(tmp_path: Path) -> None:
    for alignment in (8, 32, 4096):
        tensors = [("x", BY_NAME["F32"], (3,)), ("y", BY_NAME["F16"], (5, 7))]
        with GGUFWriter(tmp_path / "out", {"k": "v"}, tensors, alignment) as out:
            out.write("x", np.zeros(3, np.float32))
            out.write("y", np.zeros(35, np.float16))
        assert (tmp_path / "out").stat().st_size == out.nbytes


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_terminated_writer_leaves_nothing(tmp_path: Path, number: signal.Signals) -> None:
    script = (
        "import sys, time; from deskside.cli import app; from deskside import files\n"
        "write = files.WholeFile.write\n"
        "def slow(self, data):\n"
        "    write(self, data)\n"
        "    if self.tell() > 100_000: print('half', flush=True); time.sleep(60)\n"
        "files.WholeFile.write = slow\n"
        "sys.argv = ['deskside', 'synth', 'tiny-moe', 'big.gguf']\n"
        "app.main()\n"
    )
    command = [sys.executable, "-c", script]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"half\n"
        assert len(os.listdir(tmp_path)) == 1
        process.send_signal(number)
        code = process.wait(30)
    assert code == (130 if number == signal.SIGINT else -number)
    assert os.listdir(tmp_path) == []


def test_nohup_keeps_ignoring_a_hangup(tmp_path: Path) -> None:
    script = (
        "import os, signal, sys; signal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
        "from deskside.cli import app\n"
        "from deskside.convert import synth\n"
        "real = synth.synth_file\n"
        "def hung_up(*a, **k): os.kill(os.getpid(), signal.SIGHUP); real(*a, **k)\n"
        "synth.synth_file = hung_up\n"
        "sys.argv = ['deskside', 'synth', 'tiny-moe', 'big.gguf', '--layers', '1']\n"
        "app.main()\n"
    )
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True, timeout=60)
    assert os.listdir(tmp_path) == ["big.gguf"]
