import contextlib
import functools
import hashlib
import io
import random
import re
import stat
import sys
import tarfile
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from rich.console import Console

from flow_pl.data import Archive
from flow_pl.data.readers.archive import extract
from flow_pl.data.readers.download import fetch, obtain
from flow_pl.data.store.cache import progress
from flow_pl.errors import DataError

CONTENT = {"a_train.h5": random.Random(0).randbytes(5000), "deeper/a_test.h5": b"test"}


def tar_of(content, mode="w:bz2", change=lambda info: None):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:
        for name, data in content.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            change(info)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def zip_of(content, change=lambda info: None):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in content.items():
            info = zipfile.ZipInfo(name)
            info.compress_type = zipfile.ZIP_DEFLATED
            change(info)
            archive.writestr(info, data)
    return buffer.getvalue()


PACKED = tar_of(CONTENT)
SHA256 = hashlib.sha256(PACKED).hexdigest()


class Handler(BaseHTTPRequestHandler):
    """A server of one file that knows ranges, and breaks off when it is told to."""

    def do_GET(self):
        server = self.server
        start = 0
        if server.ranges and "Range" in self.headers:
            start = int(re.fullmatch(r"bytes=(\d+)-", self.headers["Range"])[1])
        server.starts.append(start)
        if start >= len(server.content):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(server.content)}")
            self.end_headers()
            return
        body = server.content[start:]
        self.send_response(206 if start else server.status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", server.version)
        self.end_headers()
        self.wfile.write(body[: server.break_off])

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.content, server.ranges, server.break_off, server.starts = PACKED, True, None, []
        server.status, server.version = 200, "one"
        server.archive = Archive(f"http://127.0.0.1:{server.server_port}/files/a.tar.bz2?x=1", SHA256)
        thread = threading.Thread(target=functools.partial(server.serve_forever, poll_interval=0.01))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def paths(tmp_path):
    folder = tmp_path / "data"
    return [folder / name for name in CONTENT]


def test_an_archive_is_fetched_verified_and_unpacked_once(server, paths):
    assert server.archive.name == "a.tar.bz2"
    for _ in range(2):
        obtain(paths, server.archive, download=True)
    assert [path.read_bytes() for path in paths] == list(CONTENT.values())
    assert server.starts == [0]
    assert sorted(path.name for path in paths[0].parent.iterdir()) == ["a_train.h5", "deeper"]


def test_nothing_is_fetched_unless_asked_for(server, paths):
    message = (
        rf"there is no .*a_train.h5 and no .*a_test.h5: set download to true, or get http://.* into {paths[0].parent}"
    )
    with pytest.raises(DataError, match=message):
        obtain(paths, server.archive, download=False)
    assert server.starts == []


def test_an_archive_that_was_put_there_is_unpacked_and_kept(server, paths):
    paths[0].parent.mkdir()
    packed = paths[0].parent / "a.tar.bz2"
    packed.write_bytes(PACKED)
    obtain(paths, server.archive, download=False)
    assert paths[0].is_file()
    assert packed.is_file()
    assert server.starts == []


def test_a_broken_connection_leaves_nothing(server, paths):
    server.break_off = 100
    with pytest.raises(DataError, match=r"cannot be fetched \(.*\): try again, or get http"):
        obtain(paths, server.archive, download=True)
    assert list(paths[0].parent.iterdir()) == []
    server.break_off = None
    obtain(paths, server.archive, download=True)
    assert [path.read_bytes() for path in paths] == list(CONTENT.values())


def test_a_wrong_checksum(server, paths):
    wrong = Archive(server.archive.url, "0" * 64)
    with pytest.raises(DataError, match=r"is not what was published \(SHA256 .*: try again, or get http"):
        obtain(paths, wrong, download=True)
    assert list(paths[0].parent.glob("a*")) == []  # nothing that would be taken for the file
    packed = paths[0].parent / "a.tar.bz2"
    packed.write_bytes(PACKED)
    with pytest.raises(DataError, match=rf"has the SHA-256 {SHA256}, but the published one is 0000.*get it again"):
        obtain(paths, wrong, download=False)
    assert packed.is_file()
    assert not paths[0].exists()


def test_without_a_network(paths):
    archive = Archive("http://127.0.0.1:9/a.tar.bz2")
    with pytest.raises(DataError, match=rf"cannot be fetched \(.*\): try again, or get http.* into {paths[0].parent}"):
        obtain(paths, archive, download=True)


@pytest.mark.parametrize("status", [404, 500])
def test_a_server_that_has_no_such_file(server, paths, status):
    server.status = status
    with pytest.raises(DataError, match=rf"cannot be fetched \({status} "):
        obtain(paths, server.archive, download=True)


def full_disk(name):
    """The file to open in place of another one: a file of that name takes no byte."""
    return "/dev/full" if str(name).endswith("a_test.h5") else name


def test_a_disk_that_becomes_full_while_unpacking(paths, tmp_path, monkeypatch):
    (tmp_path / "a.tar").write_bytes(tar_of(CONTENT, "w"))
    with monkeypatch.context() as patch:
        opened = tarfile.bltn_open
        patch.setattr(tarfile, "bltn_open", lambda name, mode: opened(full_disk(name), mode))
        with pytest.raises(DataError, match=r"a.tar cannot be unpacked into .* \(.*No space left.*or free space"):
            extract(tmp_path / "a.tar", paths[0].parent, 10**9)
    assert list(paths[0].parent.iterdir()) == []
    extract(tmp_path / "a.tar", paths[0].parent, 10**9)
    assert [path.read_bytes() for path in paths] == list(CONTENT.values())


def test_progress_is_shown_on_a_terminal_alone(server, tmp_path, monkeypatch, capsys):
    fetch(server.archive, tmp_path / "a", "by hand")
    assert list(progress(range(3), "Counting tokens")) == [0, 1, 2]
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setattr("flow_pl.data.store.cache.Console", functools.partial(Console, force_terminal=True))
    fetch(server.archive, tmp_path / "b", "by hand")
    assert list(progress(range(3), "Counting tokens")) == [0, 1, 2]
    shown = capsys.readouterr().err
    assert "100%" in shown
    assert "Counting tokens" in shown


# named, since some have the time in them: every process has to collect the same tests
every_kind = pytest.mark.parametrize(
    "packed",
    [tar_of(CONTENT, f"w:{kind}") for kind in ("", "gz", "bz2", "xz")] + [zip_of(CONTENT)],
    ids=["tar", "gz", "bz2", "xz", "zip"],
)


def test_an_archive_of_something_else(server, paths):
    with pytest.raises(DataError, match=r"a.tar.bz2 unpacks to no .*b.h5: it is not the archive of this data"):
        obtain([*paths, paths[0].parent / "b.h5"], server.archive, download=True)


@every_kind
def test_every_kind_of_archive(tmp_path, packed):
    (tmp_path / "archive").write_bytes(packed)
    extract(tmp_path / "archive", tmp_path / "out", 10**9)
    assert {str(p.relative_to(tmp_path / "out")): p.read_bytes() for p in (tmp_path / "out").rglob("*.h5")} == CONTENT


@pytest.mark.parametrize("make", [functools.partial(tar_of, mode="w"), zip_of])
@pytest.mark.parametrize("name", ["../evil", "a/../../evil", "/evil", "C:/evil", "..\\evil", "C:\\evil"])
def test_no_file_leaves_the_folder(tmp_path, make, name):
    (tmp_path / "archive").write_bytes(make({"good": b"", name: b"x"}))
    # refused, or unpacked to a name within the folder
    with contextlib.suppress(DataError):
        extract(tmp_path / "archive", tmp_path / "out", 10**9)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["archive", "out"]
    assert not any(path.is_symlink() for path in tmp_path.rglob("*"))
    assert not Path("/evil").exists()


def link(kind):
    def change(info):
        info.type, info.linkname, info.size = kind, "/etc/passwd", 0

    return change


def zip_link(info):
    info.create_system, info.external_attr = 3, (stat.S_IFLNK | 0o777) << 16


@pytest.mark.parametrize(
    "packed",
    [
        tar_of({"a": b""}, "w", link(tarfile.SYMTYPE)),
        tar_of({"a": b""}, "w", link(tarfile.LNKTYPE)),
        tar_of({"a": b""}, "w", link(tarfile.FIFOTYPE)),
        tar_of({"a": b""}, "w", link(tarfile.CHRTYPE)),
        zip_of({"a": b"/etc/passwd"}, zip_link),
    ],
    ids=["symlink", "hardlink", "fifo", "device", "symlink in zip"],
)
def test_links_and_devices_are_refused(tmp_path, packed):
    (tmp_path / "archive").write_bytes(packed)
    with pytest.raises(DataError, match="'a' is a link or not a plain file: the archive is refused"):
        extract(tmp_path / "archive", tmp_path / "out", 10**9)
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(
    "packed", [tar_of({"a": b"", "b": bytes(10**6)}, "w:gz"), zip_of({"a": bytes(10**6)})], ids=["gz", "zip"]
)
def test_archives_that_unpack_to_too_much_are_refused(tmp_path, packed):
    (tmp_path / "archive").write_bytes(packed)
    assert len(packed) < 10_000
    with pytest.raises(DataError, match="unpacks to more than 100000 bytes: it is refused"):
        extract(tmp_path / "archive", tmp_path / "out", 100_000)
    assert list((tmp_path / "out").iterdir()) == []


@every_kind
def test_damaged_archives(tmp_path, packed):
    (tmp_path / "archive").write_bytes(packed[: len(packed) // 2])
    with pytest.raises(DataError, match=r"archive cannot be unpacked into .*out .*get it again"):
        extract(tmp_path / "archive", tmp_path / "out", 10**9)
    assert list((tmp_path / "out").iterdir()) == []
