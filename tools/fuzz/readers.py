"""Intact files of every kind, and functions that read them."""

from __future__ import annotations

import functools
import gzip
import io
import json
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from flow_pl.data import (
    ArrayData,
    CharacterAfterWindow,
    ClientStoreWriter,
    FederatedDataModule,
    HDF5Data,
    Images,
    LeafData,
    NextWord,
    PartitionedData,
    TokenSequences,
    Vectors,
)
from flow_pl.data.federation import Federation
from flow_pl.data.readers.archive import extract
from flow_pl.data.store.client_store import ClientStore
from tools.fuzz.mutate import damaged, damaged_gzip, damaged_json, damaged_npz, damaged_value

Damage = Callable[[bytes, bytes, np.random.Generator], bytes]


class Sample(NamedTuple):
    """Describes an intact file.

    Attributes:
        name: name of the file; its ending determines how it is read.
        content: bytes of the file.
        read: reads a file, given by name and folder, to the end; leaves only a cache behind.
        damages: possible kinds of damage.
    """

    name: str
    content: bytes
    read: Callable[[Path], None]
    damages: tuple[Damage, ...] = (damaged,)


def samples(reader: str) -> list[Sample]:
    """Return the intact files of a reader, one of `READERS`."""
    return READERS[reader]()


def check_store(store: ClientStore) -> None:
    """Check what holds for every client store, whatever its source."""
    federation = Federation(store, new_client_fraction=0)
    for client in range(len(store)):
        rows = store.read(client)
        split = federation.split(client)
        assert isinstance(store.name(client), str)
        assert len(rows.x) == len(rows.y) > 0
        assert np.isfinite(rows.x).all()
        assert rows.y.min() >= -1
        assert rows.y.max() < store.meta.num_classes
        members = np.concatenate([split.train, split.val, split.test, split.unlabelled])
        assert sorted(members) == list(range(len(rows.y)))


def _read_data(make: Callable[[str, str], FederatedDataModule], name: str, folder: Path) -> None:
    """Create a client store, and read all of it and a batch of its clients."""

    def prepared() -> FederatedDataModule:
        data = make(str(folder / name), str(folder / "cache"))
        data.prepare_data()
        return data

    try:
        data = prepared()
    except Exception as error:
        _require_refused_again(folder / "cache", prepared, error)
        raise
    data.setup()
    check_store(data.federation.store)
    if len(data.federation.seen):
        next(iter(data.train_dataloader()))


def _require_refused_again(cache: Path, prepare: Callable[[], object], refusal: Exception) -> None:
    """Check that a refused file leaves no cache, so that it is refused again."""
    # a vocabulary is written after counting; the folder belongs to another library, and has complete files
    left = {path.name for path in cache.glob("*")} - {"datasets"}
    left = {name for name in left if not name.endswith(".vocabulary.json")}
    assert not left, f"{left} stay behind after {refusal!r}"
    try:
        prepare()
    except type(refusal):
        return
    raise AssertionError(f"a refused file ({refusal!r}) is accepted in the second attempt")


def _data(make: Callable[[str, str], FederatedDataModule], name: str) -> Callable[[Path], None]:
    return functools.partial(_read_data, make, name)


SETTINGS: dict[str, Any] = {"new_client_fraction": 0, "cohort_size": 1}


def _hdf5() -> list[Sample]:
    import h5py

    random = np.random.default_rng(0)
    pictures = {
        f"f{client}": {
            "pixels": random.random((rows, 4, 4)).astype(np.float32),
            "label": np.arange(rows, dtype=np.int32) % 3,
        }
        for client, rows in enumerate((3, 5, 4))
    }
    words = {
        f"u{client}": {"tokens": [f"the cat {'sat ' * row}" for row in range(rows)], "score": np.arange(rows)}
        for client, rows in enumerate((4, 2, 6))
    }

    def write(clients: dict[str, dict[str, Any]], libver: str, **options: Any) -> bytes:
        packed = io.BytesIO()
        with h5py.File(packed, "w", libver=libver) as file:
            for client, fields in clients.items():
                for field, values in fields.items():
                    kind = h5py.string_dtype() if isinstance(values[0], str) else values.dtype
                    file.create_dataset(f"examples/{client}/{field}", data=values, dtype=kind, **options)
        return packed.getvalue()

    def read_pictures(path: str, cache: str) -> HDF5Data:
        return HDF5Data(path, Images("pixels", "label", 4, 4), cache_dir=cache, **SETTINGS)

    def read_words(path: str, cache: str) -> HDF5Data:
        return HDF5Data(path, NextWord(vocab_size=5, length=6), cache_dir=cache, unusable_clients="skip", **SETTINGS)

    kinds: list[tuple[Any, Any, dict[str, Any]]] = [
        (pictures, read_pictures, {}),
        (pictures, read_pictures, {"compression": "gzip", "shuffle": True, "fletcher32": True, "chunks": True}),
        (words, read_words, {}),
        (words, read_words, {"compression": "gzip", "chunks": True}),
    ]
    return [
        Sample("data.h5", write(clients, libver, **options), _data(make, "data.h5"))
        for libver in ("earliest", "latest")
        for clients, make, options in kinds
    ]


def _json() -> list[Sample]:
    def leaf(data: dict[str, Any], count: str) -> bytes:
        sizes = [len(client[count]) for client in data.values()]
        return json.dumps({"users": list(data), "num_samples": sizes, "user_data": data}).encode()

    vectors = {f"c{client}": {"x": [[0.5 * row, 1.0] for row in range(4)], "y": [0, 1, 2, 1]} for client in range(3)}
    windows = {"ROMEO": {"x": ["To be or", "o be or "], "y": [" ", "n"]}, "JULIET": {"x": ["not to b"], "y": ["e"]}}
    sequence = {"target_tokens": [["the", "cat", "<EOS>", "<PAD>"]]}
    comments = {
        f"user{client}": {"x": [[["<BOS>", "the", "cat", "<EOS>"]]] * 2, "y": [sequence] * 2} for client in range(3)
    }

    def read_vectors(path: str, cache: str) -> LeafData:
        return LeafData(path, Vectors(), cache_dir=cache, **SETTINGS)

    def read_windows(path: str, cache: str) -> LeafData:
        return LeafData(path, CharacterAfterWindow(length=8), cache_dir=cache, **SETTINGS)

    def read_comments(path: str, cache: str) -> LeafData:
        return LeafData(path, TokenSequences(vocab_size=5, length=4), cache_dir=cache, **SETTINGS)

    found = []
    for content, make in (
        (leaf(vectors, "y"), read_vectors),
        (leaf(windows, "y"), read_windows),
        (leaf(comments, "x"), read_comments),
    ):
        found.append(Sample("data.json", content, _data(make, "data.json"), (damaged, damaged_json, damaged_value)))
        packed = gzip.compress(content, mtime=0)
        found.append(Sample("data.json.gz", packed, _data(make, "data.json.gz"), (damaged, damaged_gzip)))
    return found


def _npz() -> list[Sample]:
    random = np.random.default_rng(0)
    x, y, client = random.random((12, 3)).astype(np.float32), np.arange(12) % 3, np.arange(12) // 4
    names = np.array(["ann", "bob", "eve"])

    def read(path: str, cache: str) -> ArrayData:
        return ArrayData(path, cache_dir=cache, **SETTINGS)

    def read_partitioned(path: str, cache: str) -> PartitionedData:
        partitioner = {"class_path": "IidPartitioner", "init_args": {"num_partitions": 3}}
        return PartitionedData(path, partitioner, Vectors(), cache_dir=cache, **SETTINGS)

    contents = []
    for save, arrays in (
        (np.savez, {"x": x, "y": y, "client": client, "client_names": names}),
        (np.savez_compressed, {"x": x, "y": y.astype(np.float64), "client": names[client]}),
        (np.savez, {"x": x, "y": y, "client": np.char.encode(names[client])}),
    ):
        packed = io.BytesIO()
        save(packed, **arrays)  # type: ignore[arg-type]
        contents.append(packed.getvalue())
    damages = (damaged, damaged_npz, damaged_npz)
    whole = [Sample("data.npz", content, _data(read, "data.npz"), damages) for content in contents]
    return [*whole, Sample("data.npz", contents[0], _data(read_partitioned, "data.npz"), damages)]


def _parquet() -> list[Sample]:
    import pyarrow
    from pyarrow import parquet

    rows = range(12)
    columns = {
        "x": [[0.5 * row, 1.0, 2.0] for row in rows],
        "y": [None if row == 5 else row % 3 for row in rows],
        "client": [("ann", "bob", "eve")[row // 4] for row in rows],
    }
    numbers = {"a": [float(row) for row in rows], "b": [1.0] * 12, "y": [row % 3 for row in rows]}
    numbers["client"] = [row // 4 for row in rows]

    def write(table: dict[str, Any], **options: Any) -> bytes:
        packed = io.BytesIO()
        parquet.write_table(pyarrow.table(table), packed, **options)
        return packed.getvalue()

    def read(path: str, cache: str) -> ArrayData:
        return ArrayData(path, cache_dir=cache, **SETTINGS)

    def read_partitioned(path: str, cache: str) -> PartitionedData:
        partitioner = {"class_path": "NaturalIdPartitioner", "init_args": {"partition_by": "client"}}
        return PartitionedData(path, partitioner, Vectors("x", "z"), cache_dir=cache, **SETTINGS)

    texts = {**columns, "z": [row % 3 for row in rows]}
    return [
        Sample("data.parquet", content, _data(make, "data.parquet"))
        for make, content in (
            (read, write(columns)),
            (read, write(columns, compression="none", use_dictionary=False, row_group_size=5)),
            (read, write(numbers, compression="gzip", data_page_version="2.0")),
            (read, write(numbers, compression="zstd", write_page_index=True)),
            (read_partitioned, write(texts)),
        )
    ]


def _store() -> list[Sample]:
    """Return the files of a client store, one of which is replaced by a damaged one."""
    with tempfile.TemporaryDirectory() as folder:
        with ClientStoreWriter(Path(folder, "store")) as writer:
            for client in range(3):
                x = np.random.default_rng(client).random((4, 2)).astype(np.float32)
                writer.add(f"client{client}", x, np.array([0, 1, 2, -1]), val_rows=1, test_rows=1)
        files = {file.name: file.read_bytes() for file in Path(folder, "store").iterdir()}

    def read(name: str, folder: Path) -> None:
        damaged_file = (folder / name).read_bytes()
        for other, content in {**files, name: damaged_file}.items():
            (folder / other).write_bytes(content)
        store = ClientStore.open(folder)
        for client in range(len(store)):
            store.check(client)
        check_store(store)

    return [
        Sample(name, content, functools.partial(read, name), (damaged, damaged_json) if "json" in name else (damaged,))
        for name, content in sorted(files.items())
    ]


def _archive() -> list[Sample]:
    members = {"train.json": b"{}" * 50, "folder/test.json": bytes(2000)}

    def tar(mode: str) -> bytes:
        packed = io.BytesIO()
        with tarfile.open(fileobj=packed, mode=mode) as file:  # type: ignore[call-overload]
            for name, content in members.items():
                info = tarfile.TarInfo(name)
                info.size = len(content)
                file.addfile(info, io.BytesIO(content))
        return packed.getvalue()

    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in members.items():
            file.writestr(name, content)

    def read(name: str, folder: Path) -> None:
        before = set(folder.parent.iterdir())
        try:
            extract(folder / name, folder / "cache", 10**6)
        except Exception:
            assert not any(path.is_file() for path in (folder / "cache").rglob("*")), "files of a refused archive"
            raise
        finally:
            assert set(folder.parent.iterdir()) == before
            assert {path.name for path in folder.iterdir()} <= {name, "cache"}
            assert not list((folder / "cache").glob(".*.tmp"))

    whole = {"a.tar": tar("w"), "a.tar.gz": tar("w:gz"), "a.tar.bz2": tar("w:bz2"), "a.zip": packed.getvalue()}
    found = [Sample(name, content, functools.partial(read, name)) for name, content in whole.items()]

    def repacked(content: bytes, other: bytes, random: np.random.Generator) -> bytes:
        return gzip.compress(damaged(gzip.decompress(content), bytes(512), random), 1)

    return [*found, Sample("a.tar.gz", whole["a.tar.gz"], functools.partial(read, "a.tar.gz"), (repacked,))]


READERS: dict[str, Callable[[], list[Sample]]] = {
    "hdf5": functools.cache(_hdf5),
    "json": functools.cache(_json),
    "npz": functools.cache(_npz),
    "parquet": functools.cache(_parquet),
    "store": functools.cache(_store),
    "archive": functools.cache(_archive),
}
"""Functions that return intact files, by reader."""
