"""Instances that are a mapping of several features: from a file through the store to the batches of a round."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from flow_pl.data import ArrayData, ClientData, ClientStore, ClientStoreWriter
from flow_pl.data.batch import Chunk
from flow_pl.errors import ConfigurationError, DataError
from tests.named_inputs import LENGTH, write_npz

COLUMNS = {"input_ids": "ids", "attention_mask": "mask"}


def client(name: str, rows: int = 3, **changed: np.ndarray) -> ClientData:
    ids = np.arange(rows * 2).reshape(rows, 2) + len(name)
    x = {"ids": ids, "weight": np.full((rows, 1), 0.5, np.float32), **changed}
    return ClientData(name, x, np.arange(rows) % 2)


def store(path: Path, *clients: ClientData) -> ClientStore:
    with ClientStoreWriter(path) as writer:
        for each in clients:
            writer.add(*each)
    return ClientStore.open(path)


def data(tmp_path: Path, path: str | None = None, **settings: object) -> ArrayData:
    path = write_npz(str(tmp_path / "sentences.npz")) if path is None else path
    settings = {"feature_columns": COLUMNS, "cohort_size": 3, "cache_dir": str(tmp_path / "cache"), **settings}
    made = ArrayData(path, **settings)
    made.prepare_data()
    made.setup()
    return made


def test_a_store_gives_what_was_written(tmp_path):
    unlabelled = client("bob", 4)._replace(y=np.array([1, -1, 0, -1]))
    opened = pickle.loads(pickle.dumps(store(tmp_path / "store", client("ann"), unlabelled)))
    x = opened.read(1).x
    assert list(x) == ["ids", "weight"]
    # labelled rows come first, in all features
    assert x["ids"].tolist() == unlabelled.x["ids"][[0, 2, 1, 3]].tolist()
    assert x["weight"].dtype == np.float32
    assert opened.meta.features == ("ids", "weight")


def test_a_store_of_one_array_says_nothing_of_names(tmp_path):
    opened = store(tmp_path / "store", ClientData("ann", np.ones((2, 3)), np.array([0, 1])))
    assert opened.meta.features == ()
    assert "features" not in (tmp_path / "store" / "meta.json").read_text()
    assert (tmp_path / "store" / "x.npy").exists()


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (client("bob", weight=np.ones((2, 1))), r"features 'weight' \(2, 1\) and labels \(3,\)"),
        (
            client("bob", ids=np.ones((3, 5), np.int64)),
            r"features 'ids' of shape \(5,\) .* have shape \(2,\)",
        ),
        (client("bob", more=np.ones(3)), r"features named ids, more, weight.* before it have them named ids, weight;"),
        (client("bob")._replace(x=np.ones((3, 2))), r"features as one array.* have them named ids, weight"),
        (client("bob", weight=np.full((3, 1), np.nan)), r"NaN or an infinite value in row 0 of 'weight'"),
        (client("bob")._replace(x={}), r"a mapping of no features"),
    ],
)
def test_a_client_that_does_not_fit_is_refused(tmp_path, second, message):
    with pytest.raises(DataError, match=f"client 'bob' has .*{message}"):
        store(tmp_path / "store", client("ann"), second)


def test_a_damaged_file_of_one_feature_is_named(tmp_path):
    store(tmp_path / "store", client("ann"))
    os.truncate(tmp_path / "store" / "x_1.npy", 100)
    with pytest.raises(DataError, match=r"x_1\.npy is not a usable part"):
        ClientStore.open(tmp_path / "store")


def test_batches_have_every_feature_and_pad_with_an_instance_there_is(tmp_path):
    made = data(tmp_path)
    dataset = made.train_dataloader().dataset
    batch = dataset[Chunk(0, (0, 1, 2))]
    assert list(batch.train.x) == ["attention_mask", "input_ids"]
    for i, (c, size) in enumerate(zip(batch.client.tolist(), batch.train.sizes, strict=True)):
        rows = made.federation.store.read(c).x
        train = made.federation.split(c).train
        for name, x in batch.train.x.items():
            assert x[i, :size].tolist() == rows[name][train].tolist()
            assert (x[i, size:] == x[i, 0]).all()
    moved = made.on_after_batch_transfer(batch.to("cpu"), 0)
    assert moved.train.x["input_ids"].dtype == torch.int64
    some = batch.clients(1, 3)
    longest = max(some.train.sizes)
    assert some.train.x["attention_mask"].shape == (2, longest, LENGTH)


def test_a_chunk_of_no_clients_has_no_rows_of_any_feature(tmp_path):
    batch = data(tmp_path).val_dataloader().dataset[Chunk(-1, ())]
    assert batch.train.x["input_ids"].shape == batch.heldout.x["attention_mask"].shape == (0, 0, LENGTH)


def test_two_workers_load_what_the_process_itself_does(tmp_path):
    alone, workers = data(tmp_path), data(tmp_path, num_workers=2)
    for a, b in zip(alone.train_dataloader(), workers.train_dataloader(), strict=True):
        assert a.client.tolist() == b.client.tolist()
        for name in a.train.x:
            assert torch.equal(a.train.x[name], b.train.x[name])


def test_an_example_is_what_a_model_gets(tmp_path):
    made = data(tmp_path)
    example = made.example()
    assert {name: tuple(t.shape) for name, t in example.items()} == dict.fromkeys(COLUMNS, (1, LENGTH))
    x, y = made.examples(int(made.federation.seen[0]), "test")
    assert len(x["input_ids"]) == len(x["attention_mask"]) == len(y)
    with pytest.raises(ConfigurationError, match=r"several inputs \(attention_mask .*input_ids \[4\] \(torch.int64\)"):
        _ = made.feature_shape


def test_columns_of_a_name_are_joined(tmp_path):
    lines = ["client,y,a,b,c", *(f"{i % 2},{i % 2},{i},{2 * i},{3 * i}" for i in range(12))]
    (tmp_path / "table.csv").write_text("\n".join(lines))
    made = data(tmp_path, str(tmp_path / "table.csv"), feature_columns={"pair": ["a", "b"], "one": "c"}, cohort_size=1)
    x = made.federation.store.read(1).x
    assert x["pair"].tolist() == [[i, 2 * i] for i in range(1, 12, 2)]
    assert x["one"].tolist() == [[3 * i] for i in range(1, 12, 2)]


def test_a_test_file_has_the_same_features(tmp_path):
    train, test = write_npz(str(tmp_path / "a.npz")), write_npz(str(tmp_path / "b.npz"), clients=8, seed=1)
    made = data(tmp_path, train, test=test)
    rows = made.federation.store.read(0)
    assert rows.test_rows > 0
    assert len(rows.x["input_ids"]) == len(rows.x["attention_mask"]) == len(rows.y)
    assert len(made.federation.new) == 2


@pytest.mark.parametrize(
    ("settings", "changed", "message"),
    [
        ({"feature_columns": {"input_ids": "idz"}}, {}, r"has no 'idz', only .*'ids'"),
        ({}, {"mask": np.ones((3, LENGTH))}, r"arrays of shapes .*'mask': \(3, 4\).* the same number of rows"),
        ({"feature_columns": {}}, {}, r"feature_columns is \{\}, expected at least one entry"),
        ({"feature_columns": {"input_ids": []}}, {}, r"feature_columns.input_ids is \[\], expected at least one"),
        ({"feature_shape": [2, 2]}, {}, r"feature_shape is \[2, 2\], but feature_columns is a mapping"),
        ({"feature_columns": ["ids", "y"]}, {}, r"cannot be joined.* give feature_columns as a mapping"),
    ],
)
def test_bad_columns_are_refused(tmp_path, settings, changed, message):
    path = write_npz(str(tmp_path / "sentences.npz"), **changed)
    with pytest.raises((ConfigurationError, DataError), match=message):
        data(tmp_path, path, **settings)
