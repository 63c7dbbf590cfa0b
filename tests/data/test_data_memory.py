"""Memory of the pass that writes a store: a client at a time, whatever the number of clients."""

import tracemalloc
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("h5py", reason="h5py is not installed")

from published_formats import emnist, write_leaf, write_tff

from flow_pl.data import HDF5Data, Images, LeafData, NextWord
from flow_pl.data.readers.hdf5 import HDF5Source
from flow_pl.data.readers.sources import Selection

PICTURES = emnist(*range(20))
"""63 kB, and 16 kB in the store."""

SENTENCES = {"tokens": [f"one two three {n}" for n in range(120)]}
TEXTS = {"x": [f"one two three {n}" for n in range(120)]}


def hdf5(folder, clients, fields, encoding):
    files = {
        part: write_tff(folder / f"{part}.h5", {f"client_{n:04d}": fields for n in range(clients)})
        for part in ("train", "test")
    }
    return HDF5Data(**files, encoding=encoding, cache_dir=str(folder / "cache"))


def pictures(folder, clients):
    return hdf5(folder, clients, PICTURES, Images("pixels", "label"))


def sentences(folder, clients):
    """Gone through twice, for the vocabulary and for the rows."""
    return hdf5(folder, clients, SENTENCES, NextWord(vocab_size=50))


def shards(folder, clients):
    """In each part ten shards."""
    for part in ("train", "test"):
        for shard in range(10):
            users = {f"client_{n:04d}": TEXTS for n in range(shard * clients // 10, (shard + 1) * clients // 10)}
            write_leaf(folder / part / f"{shard}.json", users)
    files = {part: str(folder / part) for part in ("train", "test")}
    return LeafData(**files, encoding=NextWord("x", vocab_size=50), cache_dir=str(folder / "cache"))


def peak(data):
    """Bytes of Python's and numpy's memory at the most."""
    tracemalloc.start()
    data.prepare_data()
    memory = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    data.setup()
    return memory


@pytest.mark.parametrize(
    "make", [pictures, *(pytest.param(make, marks=pytest.mark.slow) for make in (sentences, shards))]
)
def test_a_client_is_kept_in_memory_by_its_name_and_sizes_alone(tmp_path, make):
    """For ten times the clients, some hundreds of bytes for each of them, where their examples are 16 to 60 kB."""
    few, many = 15, 150
    for folder in ("warm", "few", "many"):
        (tmp_path / folder).mkdir()
    peak(make(tmp_path / "warm", 10))  # imports, and what h5py and the progress bar keep
    difference = peak(make(tmp_path / "many", many)) - peak(make(tmp_path / "few", few))
    assert difference < (many - few) * 1500


def test_hdf5_does_not_remember_every_group(tmp_path):
    """Outside of Python's memory: 12 kB for each client, unless the library is told to keep a fixed number of them."""
    path = write_tff(tmp_path / "train.h5", {f"client_{n:04d}": {"x": [n], "y": [n]} for n in range(500)})
    source = HDF5Source(Path(path), Selection(("x", "y")))
    sizes = []
    for count, client in enumerate(source):
        assert client.columns["x"][0] == count
        sizes.append(source._file.id.get_mdc_size()[0])
    assert max(sizes) == sizes[0] <= 2**21
    source.close()


def test_what_memory_is_measured(tmp_path):
    """The measure sees what a reader that gathers everything would take."""
    tracemalloc.start()
    kept = [np.array(PICTURES["pixels"]) for _ in range(100)]
    assert tracemalloc.get_traced_memory()[1] > 6e6
    tracemalloc.stop()
    assert len(kept) == 100
