"""A store whose writing breaks off is gone on with, and ends as if nothing had happened."""

import contextlib
import logging
import multiprocessing
import os
import signal
from functools import partial
from pathlib import Path

import numpy as np
import pytest

h5py = pytest.importorskip("h5py", reason="h5py is not installed")

from published_formats import posts, reddit, write_leaf, write_tff  # noqa: E402

import flow_pl.data.encodings.encoded  # noqa: E402
from flow_pl.data import (  # noqa: E402
    ClientStore,
    ClientStoreWriter,
    HDF5Data,
    LeafData,
    NextWord,
    SyntheticData,
    TokenSequences,
)
from flow_pl.data.readers.hdf5 import HDF5Source  # noqa: E402
from flow_pl.data.store.client_store import FORMAT_VERSION  # noqa: E402
from flow_pl.errors import ConfigurationError, DataError  # noqa: E402

USERS = "abcdef"
SENTENCES = ["the cat sat", "a dog ran", "the dog sat", "a cat"]


def tff(folder):
    """Six users, of whom `c` has no text, some with test sentences; one in the test file alone; and two held out."""
    users = {user: posts(*SENTENCES[: 1 + n % 4]) for n, user in enumerate(USERS)} | {"c": posts("")}
    test = {user: posts("the cat") for user in "abdz"}
    heldout = {"x": posts("a a"), "y": posts("the the")}
    files = {"train": users, "test": test, "heldout": heldout}
    paths = {part: write_tff(folder / f"{part}.h5", clients) for part, clients in files.items()}
    return partial(HDF5Data, encoding=NextWord(vocab_size=5), unusable_clients="skip", **paths)


def tff_apart(folder):
    """Test users of their own, who have the names of training users."""
    files = {"train": USERS[:4], "test": USERS}
    paths = {
        part: write_tff(folder / f"{part}.h5", {user: posts(*SENTENCES) for user in users})
        for part, users in files.items()
    }
    return partial(HDF5Data, encoding=NextWord(vocab_size=5), same_clients=False, **paths)


def leaf(folder):
    """Two shards a part, as LEAF's Reddit."""
    for part in ("train", "val", "test"):
        for shard, users in enumerate((USERS[:4], USERS[4:])):
            data = {user: reddit(*SENTENCES[: 1 + n % 3]) for n, user in enumerate(users)}
            write_leaf(folder / part / f"reddit_{shard}_{part}.json", data)
    paths = {name: str(folder / part) for name, part in (("train", "train"), ("validation", "val"), ("test", "test"))}
    return partial(LeafData, encoding=TokenSequences(vocab_size=5), **paths)


def content(path):
    return {file.name: file.read_bytes() for file in path.iterdir()}


def stores(cache):
    return [path for path in cache.iterdir() if path.is_dir()]


def undisturbed(make, cache):
    """The content of a store that is written in one go."""
    make(cache_dir=str(cache)).prepare_data()
    (store,) = stores(cache)
    return content(store)


def interrupt(monkeypatch, after):
    """Break off behind some clients."""
    joined = flow_pl.data.encodings.encoded.joined

    def broken(*args, **kwargs):
        for count, record in enumerate(joined(*args, **kwargs)):
            if count == after:
                raise KeyboardInterrupt
            yield record

    monkeypatch.setattr(flow_pl.data.encodings.encoded, "joined", broken)


@pytest.mark.parametrize("files", [tff, tff_apart, leaf])
@pytest.mark.parametrize("breaks", [(1,), (5,), (2, 3), (1, 1, 2)])
def test_the_clients_that_are_written_are_not_encoded_again(tmp_path, monkeypatch, caplog, files, breaks):
    """Broken off once and more; the client without text, which is in no store, is looked at again."""
    make = files(tmp_path)
    whole = undisturbed(make, tmp_path / "whole")
    encoded, rows = [], HDF5Data._rows
    for cls in (HDF5Data, LeafData):
        monkeypatch.setattr(cls, "_rows", lambda self, client: (encoded.append(client), rows(self, client))[1])
    first = make(cache_dir=str(tmp_path / "cache"))
    for after in breaks:
        with monkeypatch.context() as patch:
            interrupt(patch, after)
            with pytest.raises(KeyboardInterrupt):
                first.prepare_data()
        (store,) = stores(tmp_path / "cache")
        assert store.name.startswith(".")
    again = make(cache_dir=str(tmp_path / "cache"))
    with caplog.at_level(logging.INFO):
        again.prepare_data()
    assert "clients are already written, continuing after them" in caplog.text
    (store,) = stores(tmp_path / "cache")
    assert content(store) == whole
    usable = [client for client in encoded if any(len(texts) and texts[0] for texts in client.columns.values())]
    once = [(client.source, client.name) for client in usable]
    assert len(once) == len(set(once))


def test_hdf5_groups_of_written_clients_are_not_read(tmp_path, monkeypatch):
    make = tff(tmp_path)
    whole = undisturbed(make, tmp_path / "whole")
    data = make(cache_dir=str(tmp_path / "cache"))
    _ = data.vocabularies  # counted from all clients, and kept
    with monkeypatch.context() as patch:
        interrupt(patch, 4)
        with pytest.raises(KeyboardInterrupt):
            data.prepare_data()
    read = []
    read_client = HDF5Source._read
    monkeypatch.setattr(HDF5Source, "_read", lambda self, name: (read.append(name), read_client(self, name))[1])
    data.prepare_data()
    assert read == ["c", "e", "f", "x", "y", "z"]
    assert content(stores(tmp_path / "cache")[0]) == whole


def test_any_data_module_goes_on(tmp_path, monkeypatch):
    def make(cache):
        return SyntheticData(num_clients=5, cache_dir=str(tmp_path / cache))

    make("whole").prepare_data()
    written, add = [], ClientStoreWriter.add

    def fail(self, name, *args):
        if len(written) == 3:
            raise RuntimeError("the power failed")
        add(self, name, *args)
        written.append(name)

    with monkeypatch.context() as patch:
        patch.setattr(ClientStoreWriter, "add", fail)
        with pytest.raises(RuntimeError, match="the power failed"):
            make("cache").prepare_data()
    monkeypatch.setattr(
        ClientStoreWriter, "add", lambda self, name, *args: (written.append(name), add(self, name, *args))
    )
    make("cache").prepare_data()
    assert written == [f"client_{client:05d}" for client in range(5)]
    assert content(stores(tmp_path / "cache")[0]) == content(stores(tmp_path / "whole")[0])


X, Y = np.arange(12, dtype=np.float32).reshape(4, 3), np.array([0, 1, 2, 1])
CLIENTS = [("ann", X, Y), ("bob", X[1:], Y[1:], None, 1), ("carl", X[::-1], Y, 1, 1, "test"), ("dan", X[:1], Y[:1])]


def write(path, clients=CLIENTS, num_classes=None, then=None):
    """Write the clients that are not written yet, and then fail."""
    with ClientStoreWriter(path, num_classes, resume="") as writer:
        written = list(writer.written)
        for client in clients:
            if client[0] not in written:
                writer.add(*client)
        if then is not None:
            raise then
    return written


@pytest.fixture
def whole(tmp_path):
    write(tmp_path / "whole" / "s")
    return content(tmp_path / "whole" / "s")


def left_behind(tmp_path, clients=CLIENTS[:3]):
    """The folder of a writer that failed."""
    with pytest.raises(RuntimeError):
        write(tmp_path / "s", clients, then=RuntimeError())
    return tmp_path / ".s.partial"


def test_a_killed_writer_is_gone_on_with(tmp_path, whole):
    def die():
        with ClientStoreWriter(tmp_path / "s", resume="") as writer:
            writer.add(*CLIENTS[0])
            writer.add(*CLIENTS[1])
            os.kill(os.getpid(), signal.SIGKILL)

    process = multiprocessing.get_context("fork").Process(target=die)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    with pytest.raises(DataError, match=r"meta.json is not a usable part of a client store"):
        ClientStore.open(tmp_path / ".s.partial")
    assert write(tmp_path / "s") == ["ann", "bob"]
    assert content(tmp_path / "s") == whole
    assert not (tmp_path / ".s.partial").exists()


def truncated(count):
    return lambda content: content[:-count]


def overwritten(content):
    return content[:-30] + b"\0" * 30


@pytest.mark.parametrize(
    ("file", "damage", "kept"),
    [
        ("journal.jsonl", truncated(1), ["ann", "bob"]),
        ("journal.jsonl", truncated(20), ["ann", "bob"]),
        ("journal.jsonl", overwritten, ["ann", "bob"]),
        ("journal.jsonl", lambda content: content + b'["dan", 1, 1, -1', ["ann", "bob", "carl"]),
        ("journal.jsonl", lambda content: content.replace(b'"format": %d' % FORMAT_VERSION, b'"format": 2'), []),
        ("journal.jsonl", lambda content: b"", []),
        ("journal.jsonl", None, []),
        ("x.npy", truncated(1), ["ann", "bob"]),
        ("x.npy", truncated(60), ["ann"]),
        ("x.npy", overwritten, ["ann", "bob"]),
        ("x.npy", lambda content: content + b"half a row", ["ann", "bob", "carl"]),
        ("x.npy", lambda content: content[:20], []),
        ("x.npy", None, []),
        ("y.npy", truncated(1), ["ann", "bob"]),
        ("y.npy", lambda content: content + b"\0", ["ann", "bob", "carl"]),
        ("y.npy", lambda content: b"", []),
        ("y.npy", None, []),
    ],
)
def test_nothing_half_written_is_gone_on_with(tmp_path, whole, file, damage, kept):
    """Whatever a kill or a power cut leaves of the files: the first clients that are whole are kept."""
    path = left_behind(tmp_path) / file
    if damage is None:
        path.unlink()
    else:
        path.write_bytes(damage(path.read_bytes()))
    assert write(tmp_path / "s") == kept
    assert content(tmp_path / "s") == whole


def test_other_clients_or_classes_are_not_gone_on_with(tmp_path):
    left_behind(tmp_path)
    with ClientStoreWriter(tmp_path / "s", resume="another draw") as writer:
        assert list(writer.written) == []
        writer.add(*CLIENTS[0])
    (tmp_path / "s").rename(tmp_path / "t")
    left_behind(tmp_path)
    assert write(tmp_path / "s", num_classes=3) == []
    assert ClientStore.open(tmp_path / "s").meta.num_classes == 3


def test_a_writer_that_was_killed_before_the_last_step(tmp_path, whole, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", lambda self, target: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            write(tmp_path / "s")
    assert write(tmp_path / "s") == ["ann", "bob", "carl", "dan"]
    assert content(tmp_path / "s") == whole


def test_a_client_that_cannot_be_used_leaves_nothing(tmp_path):
    with pytest.raises(DataError, match="client 'eve' has no rows"):
        write(tmp_path / "s", [*CLIENTS, ("eve", X[:0], Y[:0])])
    with pytest.raises(RuntimeError):
        write(tmp_path / "s", [], then=RuntimeError())
    with pytest.raises(DataError, match="no client to write"):
        write(tmp_path / "s", [])
    assert list(tmp_path.iterdir()) == []


def test_after_a_full_disk_the_writer_goes_on(tmp_path, whole, monkeypatch):
    """The disk is full when the third client is noted."""
    from flow_pl.data.store.journal import Journal

    append = Journal.append

    def full(self, entry):
        if entry.name == "carl":
            raise OSError(28, "No space left on device")
        append(self, entry)

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "append", full)
        message = (
            r"store .* cannot be written \(.*No space left.*The written clients stay in .*\.s\.partial, to resume from"
        )
        with pytest.raises(ConfigurationError, match=message):
            write(tmp_path / "s")
    assert write(tmp_path / "s") == ["ann", "bob"]
    assert content(tmp_path / "s") == whole


def test_a_second_writer_does_not_touch_what_the_first_one_writes(tmp_path, whole):
    with ClientStoreWriter(tmp_path / "s", resume="") as slow:
        slow.add(*CLIENTS[0])
        assert write(tmp_path / "s", CLIENTS[1:]) == []
        slow.add(*CLIENTS[1])
    assert [ClientStore.open(tmp_path / "s").name(client) for client in range(3)] == ["bob", "carl", "dan"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["s", "whole"]


def test_of_two_writers_the_one_that_goes_on_may_finish_first(tmp_path, whole):
    left_behind(tmp_path)
    with ClientStoreWriter(tmp_path / "s", resume="") as first:
        with pytest.raises(RuntimeError):
            write(tmp_path / "s", then=RuntimeError())
        assert list(first.written) == ["ann", "bob", "carl"]
        first.add(*CLIENTS[3])
    assert content(tmp_path / "s") == whole
    assert sorted(path.name for path in tmp_path.iterdir()) == ["s", "whole"]


def test_without_locks_nothing_is_resumed(tmp_path, whole, monkeypatch):
    monkeypatch.setattr("flow_pl.data.store.journal.fcntl", None)
    with pytest.raises(RuntimeError):
        write(tmp_path / "s", CLIENTS[:3], then=RuntimeError())
    assert write(tmp_path / "s") == []
    assert content(tmp_path / "s") == whole


def test_processes_that_build_the_same_store_at_once(tmp_path, whole):
    """Each fails or is killed now and then, and tries again unless killed; what comes out is a whole store."""

    def build(seed):
        random = np.random.default_rng(seed)
        while not (tmp_path / "s").exists():
            with contextlib.suppress(RuntimeError), ClientStoreWriter(tmp_path / "s", resume="") as writer:
                for client in CLIENTS:
                    if client[0] in writer.written:
                        continue
                    writer.add(*client)
                    if random.random() < 0.2:
                        raise RuntimeError
                    if random.random() < 0.02:
                        os.kill(os.getpid(), signal.SIGKILL)

    for attempt in range(3):
        processes = [multiprocessing.get_context("fork").Process(target=build, args=((attempt, i),)) for i in range(4)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
            assert process.exitcode in (0, -signal.SIGKILL)
        if (tmp_path / "s").exists():  # else all were killed
            assert content(tmp_path / "s") == whole
            (tmp_path / "s").rename(tmp_path / f"store {attempt}")
    assert list(tmp_path.glob("store *"))
