import os
import warnings

import numpy as np
import pytest
import torch

from flow_pl.data import ArrayData
from flow_pl.data.feature_scale import FeatureScaleWarning
from flow_pl.errors import ConfigurationError, DataError

X = np.arange(12, dtype=np.float32).reshape(6, 2)
Y = np.array([0, 1, 2, 0, 1, 2])
CLIENT = np.array(["b", "a", "b", "c", "a", "b"])


def save(path, **arrays):
    np.savez(path, **({"x": X, "y": Y, "client": CLIENT} | arrays))
    return str(path)


def save_columns(path, columns):
    arrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    from pyarrow import parquet

    parquet.write_table(arrow.table(columns), path)
    return str(path)


def save_parquet(path, **columns):
    default = {"client": CLIENT.tolist(), "y": Y, "left": X[:, 0], "right": X[:, 1]}
    return save_columns(path, {name: values for name, values in (default | columns).items() if values is not None})


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
    with pytest.raises(DataError, match=r"b.npz: client 2 is not an index into its 2 client_names"):
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


@pytest.mark.parametrize(
    ("stored", "shape"), [((3, 5, 2), (2, 3, 5)), ((2, 2, 4), (4, 2, 2)), ((5, 1), (1, 5)), ((2, 3, 5), (2, 3, 5))]
)
def test_channels_that_are_stored_last_come_first(tmp_path, stored, shape):
    x = np.arange(6 * np.prod(stored)).reshape(6, *stored).astype(np.float32)
    expected = x if stored == shape else np.moveaxis(x, -1, 1)
    assert read(save(tmp_path / "a.npz", x=x), feature_shape=list(shape))["c"][0] == [expected[3].tolist()]


@pytest.mark.parametrize(("stored", "shape"), [((2, 3, 4), (6, 4)), ((24,), (2, 3, 4)), ((6, 4), (1, 2, 3, 4))])
def test_axes_may_be_split_and_joined(tmp_path, stored, shape):
    x = np.arange(6 * 24).reshape(6, *stored).astype(np.float32)
    found = read(save(tmp_path / "a.npz", x=x), feature_shape=list(shape))["c"][0]
    assert found == [x[3].reshape(shape).tolist()]


@pytest.mark.parametrize(
    ("stored", "shape"), [((3, 5, 2), (5, 3, 2)), ((2, 3, 5), (3, 5, 2)), ((2, 3), (3, 2, 1)), ((4, 6), (6, 4))]
)
def test_axes_are_not_mixed(tmp_path, stored, shape):
    """(4, 6) as (6, 4) may be channels last, thus it is turned; what cannot be told is refused."""
    x = np.arange(6 * np.prod(stored)).reshape(6, *stored).astype(np.float32)
    path = save(tmp_path / "a.npz", x=x)
    if stored == (4, 6):
        assert read(path, feature_shape=list(shape))["c"][0] == [x[3].T.tolist()]
        return
    with pytest.raises(ConfigurationError, match=r"in the same order of the axes"):
        read(path, feature_shape=list(shape))


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


@pytest.mark.parametrize("dtype", ["u1", "u2", "u4", "u8", "i1", "i2", "i4", "i8", "f2", "f4", "f8"])
def test_labels_and_features_of_any_number_type(tmp_path, dtype):
    """Whole numbers and fractions; single columns of bytes are numbers, not pixels."""
    paths = [save(tmp_path / "a.npz", y=Y.astype(dtype))]
    paths.append(
        save_parquet(tmp_path / "a.parquet", y=Y.astype(dtype), left=X[:, 0].astype(dtype), right=X[:, 1].astype(dtype))
    )
    for path in paths:
        assert read(path) == GROUPED
        data = prepared(path, tmp_path)
        assert data.example().dtype == torch.float32
        assert data.num_classes == 3


def test_categories_decimal_numbers_and_truth_values(tmp_path):
    arrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    columns = {
        "client": arrow.array(CLIENT.tolist()).dictionary_encode(),
        "y": arrow.array([True, False, None, True, True, False]),
        "left": arrow.array([1.5, 2, 3, 4, 5, 6]).cast(arrow.decimal128(9, 3)),
        "right": arrow.array([True, False, False, True, True, False]),
    }
    found = read(save_parquet(tmp_path / "a.parquet", **columns))
    assert found["b"] == ([[1.5, 1], [3, 0], [6, 0]], [1, -1, 0])
    numbers = arrow.array([7, 8, 7, 9, 8, 7]).dictionary_encode()
    found = read(save_parquet(tmp_path / "b.parquet", client=numbers, y=numbers))
    assert list(found) == ["7", "8", "9"]
    assert found["7"][1] == [7, 7, 7]


@pytest.mark.parametrize("inner", ["bool", "uint8", "int64", "float64", "float16"])
def test_lists_of_any_type(tmp_path, inner):
    """Bytes in lists are pixels, truth values 0 and 1; other whole numbers are numbers, unless they are tokens."""
    arrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    rows = (np.arange(24).reshape(6, 4) % 2 if inner == "bool" else np.arange(24).reshape(6, 4)).astype(inner)
    column = arrow.array([list(row) for row in rows], type=arrow.list_(arrow.from_numpy_dtype(rows.dtype)))
    path = save_parquet(tmp_path / "a.parquet", left=None, right=None, image=column)
    x = prepared(path, tmp_path, new_client_fraction=0, test_fraction=0, val_fraction=0).examples(0, "train")[0]
    assert x.dtype == torch.float32
    np.testing.assert_array_equal(x, rows[[1, 4]].astype(np.float32) / (255 if inner == "uint8" else 1))
    if inner == "int64":
        assert prepared(path, tmp_path, tokens=True).example().dtype == torch.int64


def test_bytes_are_tokens_where_these_are_asked_for(tmp_path):
    """Also if all of them are 0 or 1."""
    for x in (np.arange(24).reshape(6, 4).astype(np.uint8), np.eye(6, dtype=np.uint8)):
        path = save(tmp_path / "a.npz", x=x)
        settings = {"new_client_fraction": 0, "test_fraction": 0, "val_fraction": 0}
        found = prepared(path, tmp_path, tokens=True, **settings).examples(0, "train")[0]
        assert found.dtype == torch.int64
        assert found.tolist() == x[[1, 4]].tolist()
        named = prepared(path, tmp_path, tokens=True, feature_columns={"ids": "x"}, **settings)
        assert named.examples(0, "train")[0]["ids"].tolist() == x[[1, 4]].tolist()
        assert prepared(path, tmp_path).example().dtype == torch.float32


@pytest.mark.parametrize(("first", "second"), [("u1", "i8"), ("i4", "u1"), ("u8", "i2"), ("f2", "i4"), ("?", "i2")])
def test_a_test_file_may_have_whole_numbers_of_another_type(tmp_path, first, second):
    """Also if a client, here c, is in one of the files alone."""
    x, y = X.astype(int), Y % 2
    tokens = {name: name if name in ("i2", "i4", "i8", "u8") else "i1" for name in (first, second)}
    train = save(tmp_path / "a.npz", x=x.astype(tokens[first]), y=y.astype(first))
    some = slice(3)  # rows of a and b
    test = save(tmp_path / "b.npz", x=x[some].astype(tokens[second]), y=y[some].astype(second), client=CLIENT[some])
    data = prepared(train, tmp_path, test=test, tokens=True, val_fraction=0, new_client_fraction=0)
    names = [data.client_name(client) for client in range(3)]
    assert names == ["a", "b", "c"]
    for client, name in enumerate(names):
        for part, rows in (("train", name == CLIENT), ("test", (name == CLIENT) & (np.arange(6) < 3))):
            features, labels = data.examples(client, part)
            assert (features.tolist(), labels.tolist()) == (x[rows].tolist(), y[rows].tolist())


def test_pictures_of_zeros_and_ones_are_not_scaled(tmp_path):
    for largest in (1, 2):
        x = (np.arange(6 * 4).reshape(6, 2, 2) % (largest + 1)).astype(np.uint8)
        found = prepared(
            save(tmp_path / "a.npz", x=x), tmp_path, test_fraction=0, val_fraction=0, new_client_fraction=0
        )
        expected = x[[1, 4]] / np.float32(1 if largest == 1 else 255)
        np.testing.assert_array_equal(found.examples(0, "train")[0], expected)


def test_texts_are_classes_in_sorted_order(tmp_path):
    labels = np.array(["oak", "ash", "", "elm", "ash", "oak"])
    expected = {"a": [0, 0], "b": [2, -1, 2], "c": [1]}
    paths = [save(tmp_path / f"{kind}.npz", y=labels.astype(kind)) for kind in ("U", "S")]
    nulls = [text or None for text in labels.tolist()]
    arrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    paths += [save_parquet(tmp_path / "a.parquet", y=labels.tolist())]
    paths += [save_parquet(tmp_path / "b.parquet", y=arrow.array(nulls, type=kind)) for kind in KINDS(arrow)]
    for path in paths:
        assert {name: y for name, (_, y) in read(path).items()} == expected
        data = prepared(path, tmp_path)
        assert data.class_names == ("ash", "elm", "oak")
        assert data.num_classes == 3


def test_classes_of_another_file_may_be_named(tmp_path):
    path, names = save(tmp_path / "a.npz", y=np.array(["oak", "ash", "", "elm", "ash", "oak"])), ["oak", "fir", "elm"]
    data = prepared(path, tmp_path, classes=[*names, "ash"])
    assert (data.class_names, data.num_classes) == ((*names, "ash"), 4)
    assert read(path, classes=[*names, "ash"])["b"][1] == [0, -1, 0]
    with pytest.raises(DataError, match=r"a.npz: the label 'ash' is not among classes \(oak, fir, elm\): add it"):
        read(path, classes=names)
    with pytest.raises(DataError, match=r"b.npz: the labels are numbers, but classes are named for texts"):
        read(save(tmp_path / "b.npz"), classes=names)
    for wrong in ({"classes": ["a", "a"]}, {"classes": names, "labels": "values"}):
        with pytest.raises(ConfigurationError, match=r"classes is a, a, expected a name|but labels is values: set cl"):
            ArrayData(path, **wrong)


def KINDS(arrow):  # noqa: N802
    return [arrow.string(), arrow.large_string(), arrow.dictionary(arrow.int8(), arrow.string())]


def test_what_pandas_writes_as_its_index_is_no_feature(tmp_path):
    pandas = pytest.importorskip("pandas", reason="pandas is not installed")
    pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    frame = pandas.DataFrame({"client": CLIENT, "y": Y, "left": X[:, 0], "right": X[:, 1]})
    frames = {
        "shuffled": frame.sample(frac=1, random_state=0).sort_index(),
        "dropped": frame.loc[[0, 1, 2, 3, 4, 5]].set_axis([3, 5, 8, 9, 11, 13]),
        "named": frame.set_axis(pandas.Index([3, 5, 8, 9, 11, 13], name="row")),
        "two": frame.set_axis(pandas.MultiIndex.from_arrays([range(6), range(6)])),
        "client": frame.set_index("client"),
        "reset": frame.set_axis([3, 5, 8, 9, 11, 13]).reset_index(),
        "unnamed": frame.assign(**{"Unnamed: 0": range(6)}),
    }
    for name, table in frames.items():
        table.to_parquet(tmp_path / f"{name}.parquet")
        assert read(str(tmp_path / f"{name}.parquet")) == GROUPED
    for name in ("dropped", "two", "reset"):
        frames[name].to_csv(tmp_path / f"{name}.csv")
        assert read(str(tmp_path / f"{name}.csv")) == GROUPED
    path = str(tmp_path / "reset.parquet")
    assert read(path, feature_columns=["index"])["c"] == ([[9]], [0])
    frame.assign(index=[1.5] * 6).to_parquet(path)  # a feature that has this name
    assert read(path)["c"][0] == [[6, 7, 1.5]]


def test_a_client_without_a_label_is_left_out(tmp_path):
    path = save(tmp_path / "a.npz", y=np.array([0, 1, 0, -1, 1, 1]))
    with pytest.warns(UserWarning, match=r"clients left out, since they have no label.*: 1 \(c\)"):
        data = prepared(path, tmp_path)
    assert [data.client_name(client) for client in range(2)] == ["a", "b"]
    assert len(data.federation.store) == 2
    with pytest.raises(DataError, match=r"client 'c' has no labelled row: .* or set unusable_clients to skip"):
        prepared(path, tmp_path, unusable_clients="error")


def test_a_client_with_labels_to_test_alone_is_left_out(tmp_path):
    """Nothing can be learned from it."""
    paths = save(tmp_path / "a.npz", y=np.array([0, 1, 0, -1, 1, 1])), save(tmp_path / "b.npz")
    with pytest.warns(UserWarning, match=r"clients left out, since they have no label.*: 1 \(c\)"):
        data = prepared(paths[0], tmp_path, test=paths[1])
    assert [data.client_name(client) for client in range(len(data.federation.store))] == ["a", "b"]
    with pytest.raises(DataError, match=r"client 'c' has no labelled row among the 1 to train on, beside 1 for"):
        prepared(paths[0], tmp_path, test=paths[1], unusable_clients="error")


def test_a_column_that_is_there_twice(tmp_path):
    arrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    from pyarrow import parquet

    path = tmp_path / "a.parquet"
    parquet.write_table(
        arrow.Table.from_arrays([CLIENT.tolist(), Y, X[:, 0], X[:, 1]], names=["client", "y", "z", "z"]), path
    )
    with pytest.raises(DataError, match=r"has the column 'z' more than once: give every column a name of its own"):
        read(str(path))


def prepared(path, tmp_path, **settings):
    data = ArrayData(path, cache_dir=str(tmp_path / "cache"), **settings)
    data.prepare_data()
    data.setup()
    return data


def test_a_test_file_has_the_same_classes(tmp_path):
    """The number of a label does not depend on the file; clients of the test file alone are new."""
    train = save(tmp_path / "train.npz", y=np.array(["elm", "oak", "elm", "oak", "elm", "oak"]))
    test = save(
        tmp_path / "test.npz", y=np.array(["fir", "oak", "", "ash", "oak", "oak"]), client=np.array(list("abddda"))
    )
    data = prepared(train, tmp_path, test=test, val_fraction=0)
    assert data.class_names == ("ash", "elm", "fir", "oak")
    federation = data.federation
    assert [data.population(client) for client in range(4)] == ["seen", "seen", "seen", "new"]
    assert federation.test_sizes.tolist()[:3] == [2, 1, 0]
    assert data.examples(0, "train")[1].tolist() == [3, 1]
    assert data.examples(0, "test")[1].tolist() == [2, 3]
    np.testing.assert_array_equal(data.examples(0, "test")[0], X[[0, 5]])
    assert data.examples(3, "unlabelled")[1].tolist() == [-1]


def test_test_files_that_do_not_fit(tmp_path):
    train = save(tmp_path / "train.npz")
    with pytest.raises(DataError, match=r"the labels are texts in one, numbers in the other"):
        prepared(train, tmp_path, test=save(tmp_path / "a.npz", y=Y.astype(str)))
    with pytest.raises(DataError, match=r"b.npz: features have shape \(1,\) and labels \(\), in .* they have \(2,\)"):
        prepared(train, tmp_path, test=save(tmp_path / "b.npz", x=X[:, :1]))
    with pytest.raises(ConfigurationError, match=r"test is c.txt, expected a file ending on .npz"):
        ArrayData(train, test="c.txt")


def test_columns_of_a_test_file_are_matched_by_name(tmp_path):
    train = save_parquet(tmp_path / "train.parquet")
    turned = {"client": CLIENT.tolist(), "right": X[:, 1], "y": Y, "left": X[:, 0]}
    test = save_columns(tmp_path / "test.parquet", turned)
    for _, x, _, _, rows, *_ in ArrayData(train, test=test).clients():
        np.testing.assert_array_equal(x[:rows], x[rows:])  # the same rows in both files
    indexed = save_columns(tmp_path / "index.parquet", turned | {"__index_level_0__": np.arange(6)})
    assert [len(y) for _, _, y, *_ in ArrayData(train, test=indexed).clients()] == [4, 6, 2]
    for others in ({"up": X[:, 0]}, {"left": None}, {"left": None, "up": X[:, 0]}):
        columns = {name: values for name, values in (turned | others).items() if values is not None}
        test = save_columns(tmp_path / "other.parquet", columns)
        with pytest.raises(DataError, match=r"other.parquet has the features .*, in .*train.parquet they are left, ri"):
            read(train, test=test)
    test = save_columns(tmp_path / "more.parquet", turned | {"up": X[:, 0]})
    assert read(train, test=test, feature_columns=["left"])["c"] == ([[6], [6]], [0, 0])


def test_a_column_that_looks_like_row_numbers_in_one_file_alone(tmp_path):
    columns = {"client": CLIENT.tolist(), "y": Y, "left": X[:, 0]}
    train = save_columns(tmp_path / "train.parquet", columns | {"index": [1, 1, 2, 3, 4, 5]})
    test = save_columns(tmp_path / "test.parquet", columns | {"index": [6, 5, 4, 3, 2, 1]})
    assert read(train, test=test)["c"][0] == [[6, 3], [6, 3]]
    with pytest.raises(DataError, match=r"train.parquet has the features left, index, in .*test.parquet they are left"):
        read(test, test=train)


@pytest.mark.parametrize("other", [np.float32, np.float64, np.bool_, np.int64])
def test_bytes_and_other_types_are_not_joined(tmp_path, other):
    train = save(tmp_path / "train.npz", x=np.ones((6, 2), dtype=np.uint8))
    test = save(tmp_path / "test.npz", x=np.ones((6, 2), dtype=other), client=np.array(list("ddefff")))
    with pytest.raises(DataError, match=r"test.npz: features have type .*train.npz they have uint8 \(bytes, scaled"):
        read(train, test=test)
    with pytest.raises(DataError, match=r"train.npz: features 'm' have type uint8 .*write both files with the same ty"):
        read(test, test=train, feature_columns={"m": "x"})


def test_features_that_need_scaling_get_a_warning(tmp_path):
    path = save(tmp_path / "large.npz", x=X * np.array([1, 500]))
    with pytest.warns(FeatureScaleWarning, match=r"square of .*, in feature 1 counted from 0: .*Standardize them"):
        prepared(path, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FeatureScaleWarning)
        prepared(save(tmp_path / "small.npz"), tmp_path)


def test_names_that_come_twice_are_refused(tmp_path):
    """The rows of one of them would be lost."""
    client, names = np.array([0, 0, 1, 1, 2, 2]), np.array(["a", "a", "b"])
    with pytest.raises(DataError, match=r"a.npz: client_names has a more than once.*rename them"):
        read(save(tmp_path / "a.npz", client=client, client_names=names))


def unlabelled_text(tmp_path, y):
    return save(tmp_path / "test.npz", y=np.array(y), client=CLIENT)


def unlabelled_column(tmp_path, y):
    return save_parquet(tmp_path / "test.parquet", y=y)


@pytest.mark.parametrize("y", [np.array(list("noonon")), np.array([0, 1, 1, 0, 1, 0])], ids=["texts", "numbers"])
@pytest.mark.parametrize("write", [unlabelled_text, unlabelled_column])
def test_a_file_to_predict_may_have_no_label_at_all(tmp_path, y, write):
    pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    columns = write is unlabelled_column
    train = save_parquet(tmp_path / "train.parquet", y=y) if columns else save(tmp_path / "train.npz", y=y)
    test = write(tmp_path, [None if columns else ""] * 6)
    for client in ArrayData(train, test=test).clients():
        assert client.y[-client.test_rows :].tolist() == [-1] * client.test_rows
        assert (client.y[: -client.test_rows] >= 0).all()


def test_a_file_to_predict_may_have_no_real_value_at_all(tmp_path):
    train = save_parquet(tmp_path / "train.parquet", y=[0.5, 1.0, 1.5, 2.0, 2.5, 3.0])
    for y in ([None] * 6, [""] * 6):
        test = save_parquet(tmp_path / "test.parquet", y=y)
        for client in ArrayData(train, test=test, labels="values").clients():
            assert np.isnan(client.y[-client.test_rows :]).all()


@pytest.mark.parametrize(
    ("known", "y"), [(["dog", "cat"] * 3, ["dog", "", "dog", "", "dog", ""]), ([1, 0] * 3, [1, None] * 3)]
)
def test_a_file_to_predict_may_have_one_of_two_classes(tmp_path, known, y):
    """-1 for what is missing, and 1: not the two classes -1 and 1."""
    train, test = save_parquet(tmp_path / "train.parquet", y=known), save_parquet(tmp_path / "test.parquet", y=y)
    found = {label for client in ArrayData(train, test=test).clients() for label in client.y.tolist()}
    assert found == {-1, 0, 1}
