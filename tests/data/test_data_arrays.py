import os
import sys

import numpy as np
import pytest

from flow_pl.data import ArrayData
from flow_pl.errors import ConfigurationError, DataError

X = np.arange(12, dtype=np.float32).reshape(6, 2)
Y = np.array([0, 1, 2, 0, 1, 2])
CLIENT = np.array(["b", "a", "b", "c", "a", "b"])


def save(path, **arrays):
    np.savez(path, **({"x": X, "y": Y, "client": CLIENT} | arrays))
    return str(path)


def save_parquet(path, **columns):
    arrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    from pyarrow import parquet

    default = {"client": CLIENT.tolist(), "y": Y, "left": X[:, 0], "right": X[:, 1]}
    table = {name: values for name, values in (default | columns).items() if values is not None}
    parquet.write_table(arrow.table(table), path)
    return str(path)


def read(path, **settings):
    return {name: (x.tolist(), y.tolist()) for name, x, y, *_ in ArrayData(path, **settings).clients()}


GROUPED = {
    "a": (X[[1, 4]].tolist(), [1, 1]),
    "b": (X[[0, 2, 5]].tolist(), [0, 2, 2]),
    "c": (X[[3]].tolist(), [0]),
}


def test_rows_are_grouped_by_client_in_their_order(tmp_path):
    assert read(save(tmp_path / "a.npz")) == GROUPED
    assert read(save_parquet(tmp_path / "a.parquet")) == GROUPED


@pytest.mark.parametrize("dtype", ["i2", "u8", "S3", "U5"])
def test_clients_may_be_integers_or_texts(tmp_path, dtype):
    path = save(tmp_path / "a.npz", client=np.array([10, 9, 10, 11, 9, 10]).astype(dtype))
    order = ["9", "10", "11"] if dtype in ("i2", "u8") else ["10", "11", "9"]
    assert list(read(path)) == order
    assert read(path)["10"] == GROUPED["b"]


def test_integer_clients_may_be_indices_into_names(tmp_path):
    path = save(tmp_path / "a.npz", client=np.array([1, 0, 1, 2, 0, 1]), client_names=np.array(["ä", "b", "c", "d"]))
    assert list(read(path)) == ["ä", "b", "c"]
    path = save(tmp_path / "b.npz", client=np.array([1, 0, 1, 2, 0, 1]), client_names=np.array(["a", "b"]))
    with pytest.raises(DataError, match=r"b.npz: client 2 is no index into its 2 client_names"):
        read(path)


def test_columns_may_have_other_names(tmp_path):
    np.savez(tmp_path / "a.npz", user=CLIENT, digit=Y, left=X[:, 0], right=X[:, 1], other=np.zeros(99))
    names = {"client_column": "user", "label_column": "digit"}
    assert read(str(tmp_path / "a.npz"), **names, feature_columns=["left", "right"]) == GROUPED
    path = save_parquet(tmp_path / "a.parquet", client=None, y=None, user=CLIENT.tolist(), digit=Y)
    assert read(path, **names) == GROUPED
    assert read(path, **names, feature_columns=["right"])["c"] == ([[7]], [0])


def test_rows_are_given_a_shape(tmp_path):
    x = np.arange(6 * 4).reshape(6, 4).astype(np.uint8)
    path = save(tmp_path / "a.npz", x=x)
    assert read(path, feature_shape=[1, 2, 2])["c"][0] == [[[[12, 13], [14, 15]]]]
    with pytest.raises(ConfigurationError, match=r"feature_shape is \[3, 2\], but a row of .* has .* shape \(4,\)"):
        read(path, feature_shape=[3, 2])


@pytest.mark.parametrize("fixed", [True, False])
def test_parquet_columns_may_hold_lists(tmp_path, fixed):
    arrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    images = np.arange(24).reshape(6, 2, 2)
    inner = arrow.list_(arrow.int64(), 2 if fixed else -1)
    column = arrow.array(images.tolist(), type=arrow.list_(inner, 2 if fixed else -1))
    path = save_parquet(tmp_path / "a.parquet", left=None, right=None, image=column)
    assert read(path)["a"][0] == images[[1, 4]].tolist()
    path = save_parquet(tmp_path / "b.parquet", left=None, right=None, y=X.astype(int).tolist(), image=column)
    assert read(path)["c"][1] == [[6, 7]]


def test_parquet_labels_may_be_null(tmp_path):
    for labels in ([0, 1, None, 0, 1, 2], [0.0, 1.0, None, 0.0, 1.0, 2.0]):
        assert read(save_parquet(tmp_path / "a.parquet", y=labels))["b"][1] == [0, -1, 2]


def test_a_store_follows_the_content_of_its_file(tmp_path):
    def labels():
        data = ArrayData(str(tmp_path / "a.npz"), cache_dir=str(tmp_path / "cache"), new_client_fraction=0)
        data.prepare_data()
        data.setup()
        return data.federation.store.read(2).y.tolist(), data.num_classes

    save(tmp_path / "a.npz")
    os.utime(tmp_path / "a.npz", ns=(10, 10))
    assert labels() == ([0], 3)
    save(tmp_path / "a.npz", y=Y + 1)  # of the same size
    os.utime(tmp_path / "a.npz", ns=(11, 11))
    assert labels() == ([1], 4)
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_unlabelled_rows_are_only_predicted(tmp_path):
    path = save(tmp_path / "a.npz", y=np.array([0, 1, -1, 0, 1, 2]))
    data = ArrayData(path, cache_dir=str(tmp_path), new_client_fraction=0, test_fraction=0, val_fraction=0)
    data.prepare_data()
    data.setup()
    (batch,) = data.predict_dataloader()
    assert batch.client.tolist() == [1]
    assert batch.train.sizes == (2,)
    assert batch.heldout.x.tolist() == [[X[2].tolist()]]
    assert batch.heldout.y.tolist() == [[-1]]


def prepare(path, tmp_path, **settings):
    data = ArrayData(path, cache_dir=str(tmp_path / "cache"), **settings)
    data.prepare_data()


NAN = X.copy()
NAN[2, 1] = np.nan


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"y": Y[:5]}, r"a.npz has arrays of shapes .*'y': \(5,\).*: all must have the same number of rows"),
        ({"x": X[:0], "y": Y[:0], "client": CLIENT[:0]}, "the same number of rows, at least one"),
        ({"y": np.array(3)}, "all must have the same number of rows"),
        ({"x": NAN}, "client 'b' has a NaN or an infinite value in row 1: clean that row"),
        ({"y": Y / 2}, "client 'a' has labels of type float64: encode them as integers"),
        ({"y": np.array([0, 1, -2, 0, 1, 2])}, "client 'b' has the label -2 in row 1: expected 0 to 2"),
        ({"y": Y + 1}, r"client 'b' has the label 3 in row 1: expected 0 to 2 \(num_classes is 3\)"),
        ({"y": np.array([0, 1, 0, -1, 1, 1])}, "client 'c' has no labelled row"),
        ({"y": Y.astype(str)}, "has labels of type <U"),
        ({"x": X.astype(str)}, "a.npz: 'x' has type <U32: encode it as numbers, or leave it out"),
        ({"client": Y / 2}, r"a.npz: 'client' has type float64 and shape \(6,\), expected one integer or text"),
        ({"client": X.astype(int)}, r"'client' has type int64 and shape \(6, 2\)"),
        ({"client": CLIENT.astype(object)}, "a.npz cannot be read .*Object arrays.*: write it anew by numpy.savez"),
    ],
)
def test_arrays_that_cannot_be_used(tmp_path, arrays, message):
    with pytest.raises(DataError, match=message):
        prepare(save(tmp_path / "a.npz", **arrays), tmp_path, num_classes=3)
    assert not list((tmp_path).glob("cache/*"))


def test_missing_columns_are_listed_with_those_found(tmp_path):
    message = r"has no 'writer' and no 'digit', only 'x', 'y', 'client': name the right ones by client_column"
    with pytest.raises(DataError, match=message):
        prepare(save(tmp_path / "a.npz"), tmp_path, client_column="writer", label_column="digit")
    with pytest.raises(DataError, match=r"has no 'z', only 'client', 'y', 'left', 'right'"):
        prepare(save_parquet(tmp_path / "a.parquet"), tmp_path, feature_columns=["left", "z"])


@pytest.mark.parametrize("suffix", [".npz", ".parquet"])
@pytest.mark.parametrize("length", [0, 100, -20])
def test_truncated_files(tmp_path, suffix, length):
    path = (save if suffix == ".npz" else save_parquet)(tmp_path / f"a{suffix}")
    os.truncate(path, length if length >= 0 else os.path.getsize(path) + length)
    with pytest.raises(DataError, match=rf"a{suffix} cannot be read .*: write it anew"):
        prepare(path, tmp_path)


def test_an_array_without_a_name(tmp_path):
    with (tmp_path / "a.npz").open("wb") as file:
        np.save(file, X)
    with pytest.raises(DataError, match=r"cannot be read \(.* a single array without names"):
        prepare(str(tmp_path / "a.npz"), tmp_path)


def test_features_that_cannot_be_joined(tmp_path):
    with pytest.raises(DataError, match=r"the features .* cannot be joined: they must have equal shapes"):
        prepare(save(tmp_path / "a.npz", z=Y), tmp_path, feature_columns=["x", "z"])


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"client": ["b", "a", None, "c", "a", "b"]}, "column 'client' has rows without a client: give every row one"),
        ({"left": [1, 2, None, 3, 4, 5]}, "client 'b' has a NaN or an infinite value in row 1"),
        ({"left": list("abcdef")}, "'left' has type object: encode it as numbers, or leave it out"),
        ({"left": None, "right": [[1], [1, 2], [1], [1], [1], [1]]}, "'right' holds lists of several lengths or none"),
        ({"left": None, "right": [[1], None, [1], [1], [1], [1]]}, "'right' holds lists of several lengths or none"),
    ],
)
def test_columns_that_cannot_be_used(tmp_path, columns, message):
    with pytest.raises(DataError, match=message):
        prepare(save_parquet(tmp_path / "a.parquet", **columns), tmp_path)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(DataError, match=r"there is no file .*none.npz: correct the path"):
        prepare(str(tmp_path / "none.npz"), tmp_path)


def test_settings_that_cannot_work():
    with pytest.raises(ConfigurationError, match=r"path is a.csv, expected a file ending on .npz or .parquet"):
        ArrayData("a.csv")
    with pytest.raises(ConfigurationError, match="num_classes is 0, expected a whole number of 1 or more"):
        ArrayData("a.npz", num_classes=0)


def test_without_pyarrow(tmp_path, monkeypatch):
    path = save_parquet(tmp_path / "a.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ConfigurationError, match=r'this data needs pyarrow .*: pip install "pyarrow>='):
        prepare(path, tmp_path)
