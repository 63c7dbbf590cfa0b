"""Files of arrays and tables that cannot be used: each is refused with one message."""

import os
import sys

import numpy as np
import pytest

from flow_pl.data import ArrayData
from flow_pl.errors import ConfigurationError, DataError
from tests.data.test_data_arrays import CLIENT, X, Y, save, save_parquet


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
        ({"x": NAN}, r"a.npz: 'x' has no value \(NaN or null\) in row 2 at \[1\]: fill it in"),
        ({"x": np.where(np.isnan(NAN), -np.inf, X)}, r"a.npz: 'x' has -inf, in row 2 at \[1\]: clean or rescale it"),
        (
            {"x": np.where(np.isnan(NAN), 1e39, X.astype(float))},
            r"'x' has 1e\+39, larger than the largest float32, 3.4028235e\+38, in row 2 at \[1\]",
        ),
        ({"y": Y / 2}, "a.npz: 'y' has the label 0.5 in row 1, expected whole numbers from 0, or texts; -1 marks"),
        ({"y": np.array([0, 1, np.nan, 0, 1, 2])}, "a.npz: 'y' has the label NaN in row 2, expected whole numbers"),
        ({"y": np.array([0, 1, np.inf, 0, 1, 2])}, "a.npz: 'y' has the label inf in row 2, expected whole numbers"),
        ({"y": np.array([0, 1, 2**63, 0, 1, 2], dtype=np.uint64)}, "'y' has the label 9223372036854775808 in row 2"),
        ({"y": np.array([1, 1, -1, 1, -1, 1])}, "the labels are only -1 and 1, but -1 marks a row to be predicted"),
        ({"y": np.array(list("abcdef"))}, r"a.npz has 6 labels \(a, b, c, d, e, f\), but num_classes is 3"),
        ({"y": Y.astype("M8[D]")}, r"a.npz: 'y' has labels of type datetime64\[D\], expected whole numbers"),
        ({"y": np.array([0, 1, -2, 0, 1, 2])}, "client 'b' has the label -2 in row 1: expected 0 to 2"),
        ({"y": Y + 1}, r"client 'b' has the label 3 in row 1: expected 0 to 2 \(num_classes is 3\)"),
        ({"y": np.full(6, -1)}, "no client to write to .* has a label: check where the labels come from"),
        ({"x": X.astype(str)}, "a.npz: 'x' has type <U32.*: encode it as numbers, or leave it out"),
        ({"client": Y / 2}, r"a.npz: 'client' has type float64 and shape \(6,\), expected one integer or text"),
        ({"client": X.astype(int)}, r"'client' has type int64 and shape \(6, 2\)"),
        ({"client": CLIENT.astype(object)}, "a.npz cannot be read .*Object arrays.*: write it again by numpy.savez"),
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
    with pytest.raises(DataError, match=rf"a{suffix} cannot be read .*: write it a(new|gain)"):
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
        (
            {"client": ["b", "a", None, "c", "a", "b"]},
            "column 'client' has rows without a client, the first is row 2: give every row one",
        ),
        ({"client": ["b", "a", "b", " ", "", "b"]}, "column 'client' has rows without a client, the first is row 3"),
        ({"left": [1, 2, None, 3, 4, 5]}, r"'left' has no value \(NaN or null\) in row 2: fill it in, leave that row"),
        ({"left": [True, False, None, True, True, True]}, r"'left' has no value \(NaN or null\) in row 2"),
        ({"left": [None] * 6}, r"'left' has no value \(NaN or null\) in row 0.* leave the column out"),
        ({"left": [1.0, 2.0, 1e300, 3.0, 4.0, 5.0]}, r"'left' has 1e\+300, larger than the largest float32"),
        ({"left": list("abcdef")}, r"'left' has type object \('a' in row 0\): encode it as numbers, or leave it out"),
        ({"left": [{"a": 1}] * 6}, r"'left' has type object \(\{'a': 1\} in row 0\): encode it as numbers"),
        ({"left": np.array([1] * 6, dtype="M8[s]")}, r"'left' has type datetime64\[ms\]: encode it as numbers"),
        (
            {"client": np.array([1] * 6, dtype="M8[s]")},
            r"'client' has type timestamp\[ms\], expected one integer or text",
        ),
        (
            {"client": X.astype(int).tolist()},
            r"'client' has type int64 and shape \(6, 2\), expected one integer or text",
        ),
        ({"y": [1.0, 2.0, None, float("nan"), 0.0, 0.0]}, "'y' has the label NaN in row 3, expected whole numbers"),
        (
            {"left": None, "right": [[1], [1, 2], [1], [1], [1], [1]]},
            "'right' holds lists of different lengths or none",
        ),
        ({"left": None, "right": [[1], None, [1], [1], [1], [1]]}, "'right' holds lists of different lengths or none"),
    ],
)
def test_columns_that_cannot_be_used(tmp_path, columns, message):
    with pytest.raises(DataError, match=message):
        prepare(save_parquet(tmp_path / "a.parquet", **columns), tmp_path)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(DataError, match=r"there is no file .*none.npz: correct the path"):
        prepare(str(tmp_path / "none.npz"), tmp_path)


def test_settings_that_cannot_work():
    with pytest.raises(ConfigurationError, match=r"path is a.txt, expected a file ending on .npz or .parquet or .csv"):
        ArrayData("a.txt")
    with pytest.raises(ConfigurationError, match="num_classes is 0, expected a whole number of 1 or more"):
        ArrayData("a.npz", num_classes=0)


def test_without_pyarrow(tmp_path, monkeypatch):
    path = save_parquet(tmp_path / "a.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ConfigurationError, match=r'this data needs pyarrow .*: pip install "pyarrow>='):
        prepare(path, tmp_path)
