"""Files that hold, or declare, far more than their size; files that lead to others."""

import bz2
import gzip
import io
import json
import tarfile
import zipfile

import numpy as np
import pytest
from published_formats import write_leaf, write_tff

from flow_pl.data import ArrayData, HDF5Data, LeafData, NextWord, PartitionedData, Vectors
from flow_pl.data.readers.archive import extract
from flow_pl.data.store import limits
from flow_pl.data.store.limits import require_bounded, require_name
from flow_pl.errors import DataError

MANY = 2 * 10**6
REFUSED = r"expands to \d+ bytes or more, but has \d+: more than 200 times its size is refused"


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    """Small files may expand to little, so that the tests need little."""
    monkeypatch.setattr(limits, "ALWAYS_ALLOWED", 10**6)


def refused(data, match):
    """Preparing the data must fail, and leave no cache."""
    with pytest.raises(DataError, match=match):
        data.prepare_data()
    left = [path.name for path in data.store_path.parent.glob("*") if path.name != "datasets"]
    assert not left


def test_the_limits(monkeypatch):
    require_bounded("a", 200 * 10**5, 10**5)
    require_bounded("a", 10**6, 1)
    with pytest.raises(DataError, match=REFUSED):
        require_bounded("a", 200 * 10**5 + 1, 10**5)
    with pytest.raises(DataError, match=REFUSED):
        require_bounded("a", 10**6 + 1, 1)


@pytest.mark.parametrize(("name", "found"), [("a\ud800", "is not valid text"), ("n" * 1025, "a name of 1025 bytes")])
def test_names_that_cannot_be_stored(name, found):
    assert require_name("n" * 1024, "a.json") == "n" * 1024
    with pytest.raises(DataError, match=f"a.json: client .* {found}"):
        require_name(name, "a.json")


@pytest.mark.parametrize("name", ["", " "])
def test_blank_names(name):
    with pytest.raises(DataError, match=f"a.json: a client has the name '{name}', which is blank: name the client of"):
        require_name(name, "a.json")


def npz(path, compression=zipfile.ZIP_STORED, **members):
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, content in members.items():
            file.writestr(f"{name}.npy", content)
    return str(path)


def npy(values, shape=None):
    """An array's file, which may declare another shape of as many digits."""
    packed = io.BytesIO()
    np.save(packed, values)
    content = packed.getvalue()
    return content if shape is None else content.replace(str(values.shape).encode(), str(shape).encode())


def test_npz_bomb(tmp_path):
    path = npz(tmp_path / "a.npz", zipfile.ZIP_DEFLATED, x=npy(np.zeros((MANY, 1))), y=npy(np.zeros(MANY, int)))
    refused(ArrayData(path, cache_dir=str(tmp_path / "cache")), REFUSED)


def test_npz_that_declares_more_than_it_holds(tmp_path):
    x = npy(np.zeros((10, 1)), (99, 9))
    path = npz(tmp_path / "a.npz", x=x, y=npy(np.zeros(10, int)), client=npy(np.zeros(10, int)))
    refused(ArrayData(path, cache_dir=str(tmp_path / "cache")), r"x.npy has 208 bytes, but declares shape \(99, 9\)")


def test_npz_with_rows_of_no_bytes(tmp_path):
    """Any number of them fits into a file."""
    content = npy(np.zeros((10, 0)), (99, 0))
    path = npz(tmp_path / "a.npz", x=content, y=npy(np.zeros(10, int)), client=npy(np.zeros(10, int)))
    refused(ArrayData(path, cache_dir=str(tmp_path / "cache")), r"declares shape \(99, 0\)")


def test_npz_with_a_member_that_is_no_array(tmp_path):
    path = npz(tmp_path / "a.npz", x=b"text", y=npy(np.zeros(10, int)), client=npy(np.zeros(10, int)))
    refused(ArrayData(path, cache_dir=str(tmp_path / "cache")), "cannot be read")


def test_leaf_bomb(tmp_path):
    path = tmp_path / "a.json.gz"
    path.write_bytes(gzip.compress(b'{"users": ["a"], "x": "' + b" " * MANY + b'"}'))
    refused(LeafData(str(path), Vectors(), cache_dir=str(tmp_path / "cache")), REFUSED)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ('{"users": ' + "[" * 100_000, "Nested too deeply"),
        ('{"users": ' + "9" * 5000, r"is not a complete LEAF file \(.*(overflow|Unexpected symbol)"),
        ('{"users": [["a"]], "num_samples": [1]}', "`users` must be a list of names"),
        (
            '{"user_data": {"a": {"x": [[1]], "y": [1e999]}}}',
            r"is not a complete LEAF file \(.*(overflow|Unexpected symbol)",
        ),
        (
            '{"user_data": {"a": {"x": [[NaN]], "y": [1]}}}',
            r"a.json is not a complete LEAF file .*JSON has no NaN.*get it",
        ),
        (r'{"user_data": {"a\ud800": {"x": [[1]], "y": [1]}}}', "surrogate pair|not valid text"),
    ],
)
def test_json_that_python_cannot_take(tmp_path, text, found):
    (tmp_path / "a.json").write_text(text)
    refused(LeafData(str(tmp_path / "a.json"), Vectors(), cache_dir=str(tmp_path / "cache")), found)


@pytest.mark.parametrize(
    ("label", "found"),
    [
        (2**31, r"label 2147483648 .* at most"),
        (1e18, r"label 1e\+18 in row 0 of 'y', expected whole numbers"),
        (1e300, r"label 1e\+300 in row 0 of 'y', expected whole numbers"),
        (0.5, r"label 0\.5 in row 0 of 'y', expected whole numbers"),
    ],
)
def test_labels_that_are_no_classes(tmp_path, label, found):
    path = write_leaf(tmp_path / "a.json", {"a": {"x": [[1.0]], "y": [label]}})
    refused(LeafData(path, Vectors(), cache_dir=str(tmp_path / "cache")), found)


def test_parquet_bomb(tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
    zeros = np.zeros(10**6)
    parquet.write_table(
        pyarrow.table({"x": zeros, "y": zeros.astype(int), "client": zeros.astype(int)}), tmp_path / "a.parquet"
    )
    refused(ArrayData(str(tmp_path / "a.parquet"), cache_dir=str(tmp_path / "cache")), REFUSED)
    pytest.importorskip("flwr_datasets", reason="flwr-datasets is not installed")
    partitioner = {"class_path": "IidPartitioner", "init_args": {"num_partitions": 3}}
    data = PartitionedData(str(tmp_path / "a.parquet"), partitioner, Vectors(), cache_dir=str(tmp_path / "cache"))
    refused(data, REFUSED)


def test_a_saved_data_set_that_leads_out_of_its_folder(tmp_path):
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    pytest.importorskip("flwr_datasets", reason="flwr-datasets is not installed")
    whole = datasets.Dataset.from_dict({"x": [[1.0]] * 4, "y": [0, 1, 0, 1]})
    whole.save_to_disk(str(tmp_path / "other"))
    whole.save_to_disk(str(tmp_path / "data"))
    state = json.loads((tmp_path / "data" / "state.json").read_text())
    state["_data_files"][0]["filename"] = f"../other/{state['_data_files'][0]['filename']}"
    (tmp_path / "data" / "state.json").write_text(json.dumps(state))
    partitioner = {"class_path": "IidPartitioner", "init_args": {"num_partitions": 2}}
    data = PartitionedData(str(tmp_path / "data"), partitioner, Vectors(), cache_dir=str(tmp_path / "cache"))
    refused(data, "refers to a file outside of the folder, '../other/")


def numbers(rows):
    return {"x": np.ones((rows, 2), np.float32), "y": np.zeros(rows, int)}


@pytest.fixture
def hdf5(tmp_path):
    """A file of TensorFlow Federated with one sound client, open for changes to another one."""
    h5py = pytest.importorskip("h5py", reason="h5py is not installed")
    path = write_tff(tmp_path / "a.h5", {"a": numbers(3)})
    with h5py.File(path, "a") as file:
        yield (
            h5py,
            file,
            file["examples"].create_group("b"),
            HDF5Data(path, Vectors(), cache_dir=str(tmp_path / "cache")),
        )


def test_hdf5_that_declares_more_than_it_holds(hdf5):
    """Chunks that were never written take no room."""
    _, file, group, data = hdf5
    group.create_dataset("x", shape=(10**12, 2), dtype=np.float32, chunks=(100, 2))
    group.create_dataset("y", shape=(10**12,), dtype=np.int64, chunks=(100,))
    file.close()
    refused(data, REFUSED)


def test_hdf5_bomb(hdf5):
    _, file, group, data = hdf5
    group.create_dataset("x", data=np.zeros((10**6, 2), np.float32), compression="gzip")
    group.create_dataset("y", data=np.zeros(10**6, int), compression="gzip")
    file.close()
    refused(data, REFUSED)


@pytest.mark.parametrize("kind", ["external link", "external storage", "virtual", "filter", "object", "compound"])
def test_hdf5_that_leads_elsewhere(hdf5, tmp_path, kind):
    h5py, file, group, data = hdf5
    other = write_tff(tmp_path / "other.h5", {"a": numbers(3)})
    group["y"] = np.zeros(3, int)
    if kind == "external link":
        group["x"] = h5py.ExternalLink(other, "examples/a/x")
    elif kind == "external storage":
        (tmp_path / "raw").write_bytes(bytes(24))
        group.create_dataset("x", (3, 2), np.float32, external=[(str(tmp_path / "raw"), 0, 24)])
    elif kind == "virtual":
        layout = h5py.VirtualLayout((3, 2), np.float32)
        layout[:] = h5py.VirtualSource(other, "examples/a/x", shape=(3, 2))
        group.create_virtual_dataset("x", layout)
    elif kind == "object":
        group.create_dataset("x", (3,), h5py.ref_dtype)
    elif kind == "compound":
        group.create_dataset("x", (3,), np.dtype([("a", "f4")]))
    else:
        group.create_dataset("x", data=np.ones((3, 2)), scaleoffset=2, chunks=(3, 2))
    file.close()
    if kind == "filter":
        data.prepare_data()  # a part of HDF5
    else:
        refused(data, "client 'b' cannot be read .*(lies? in another file|values of type)")


def texts(tmp_path, *words):
    path = write_tff(tmp_path / "t.h5", {"a": {"tokens": list(words)}})
    return tmp_path / "t.h5", HDF5Data(path, NextWord(), cache_dir=str(tmp_path / "cache"))


def test_hdf5_texts_of_a_zeroed_heap_do_not_hang(tmp_path):
    """HDF5 2.0 loops for ever where an object of no size is free."""
    pytest.importorskip("h5py", reason="h5py is not installed")
    path, data = texts(tmp_path, "the cat", "a dog")
    content = bytearray(path.read_bytes())
    heap = content.index(b"GCOL")
    content[heap + 16 : heap + 4096] = bytes(4080)
    path.write_bytes(content)
    refused(data, r"client 'a' cannot be read \(the heap of texts at \d+ is damaged\)")


def test_hdf5_rows_that_mean_one_long_text(tmp_path):
    """A file of 100 kB that would be read as 100 MB."""
    h5py = pytest.importorskip("h5py", reason="h5py is not installed")
    path, data = texts(tmp_path, *["word " * 20_000, *["x"] * 999])
    content = path.read_bytes()
    with h5py.File(path) as file:
        at = file["examples/a/tokens"].id.get_offset()
    first = content[at : at + 16]
    path.write_bytes(content[:at] + first * 1000 + content[at + 16_000 :])
    refused(data, REFUSED)


@pytest.mark.parametrize("options", [{}, {"chunks": (3,)}, {"chunks": (3,), "compression": "gzip", "shuffle": True}])
def test_hdf5_texts_are_read_however_they_are_stored(tmp_path, options):
    h5py = pytest.importorskip("h5py", reason="h5py is not installed")
    with h5py.File(tmp_path / "t.h5", "w", userblock_size=512) as file:
        words = ["the cat", "", "a dog sat", "the dog"]
        file.create_dataset("examples/a/tokens", data=words, dtype=h5py.string_dtype(), **options)
    data = HDF5Data(str(tmp_path / "t.h5"), NextWord(), new_client_fraction=0, cache_dir=str(tmp_path / "cache"))
    data.prepare_data()
    data.setup()
    assert len(data.federation.store.read(0).y) == 3, "without the empty one"


@pytest.mark.parametrize("kind", ["zip", "gz", "bz2", "header"])
def test_archive_bomb(tmp_path, kind):
    archive = tmp_path / f"a.{kind}"
    if kind == "zip":
        with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
            file.writestr("a", bytes(MANY))
    else:
        packed = io.BytesIO()
        with tarfile.open(fileobj=packed, mode="w") as file:
            info = tarfile.TarInfo("a" if kind != "header" else "n" * MANY)  # the name itself is the bomb
            info.size = MANY if kind != "header" else 0
            file.addfile(info, io.BytesIO(bytes(MANY)))
        archive.write_bytes((bz2 if kind == "bz2" else gzip).compress(packed.getvalue()))
    with pytest.raises(DataError, match=REFUSED):
        extract(archive, tmp_path / "out", 10**9)
    assert not list((tmp_path / "out").iterdir())


def test_archive_with_a_name_that_no_file_can_have(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as file:
        file.writestr("a" * 300, b"")
    with pytest.raises(DataError, match="cannot be unpacked into"):
        extract(tmp_path / "a.zip", tmp_path / "out", 10**9)
