import json
import multiprocessing
import os
import pickle
import re
import signal
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from flow_pl.data import ClientStore, ClientStoreWriter, Federation, SyntheticData
from flow_pl.data.store.client_store import FORMAT_VERSION
from flow_pl.errors import ConfigurationError, DataError

X = np.arange(12, dtype=np.float32).reshape(4, 3)
Y = np.array([0, 1, 2, 1])


def write(path, *clients, num_classes=None):
    with ClientStoreWriter(path, num_classes) as writer:
        for client in clients:
            writer.add(*client)
    return ClientStore.open(path)


@pytest.mark.parametrize("dtype", [np.uint8, np.int64, np.float16, np.float32, np.float64, bool, ">f4"])
def test_rows_come_back_as_they_were_written(tmp_path, dtype):
    x = np.arange(24).reshape(4, 2, 3).astype(dtype)
    store = write(tmp_path / "s", ("ann", x, Y), ("böb", x[:1], Y[:1]))
    assert len(store) == 2
    assert store.feature_shape == (2, 3)
    assert store.feature_dtype == np.dtype(dtype).newbyteorder("=")
    assert store.meta.num_classes == 3
    np.testing.assert_array_equal(store.read(0).x, x)
    np.testing.assert_array_equal(store.read(0).y, Y)
    np.testing.assert_array_equal(store.read(1).x, x[:1])
    assert [store.name(0), store.name(1)] == ["ann", "böb"]
    np.testing.assert_array_equal(store.sizes, [4, 1])


@pytest.mark.parametrize("shape", [(5,), (2, 3)])
def test_labels_may_be_sequences(tmp_path, shape):
    y = np.arange(4 * np.prod(shape)).reshape(4, *shape)
    store = write(tmp_path / "s", ("ann", X, y), num_classes=100)
    assert store.label_shape == shape
    assert store.meta.num_classes == 100
    np.testing.assert_array_equal(store.read(0).y, y)


@pytest.mark.parametrize(
    ("given", "stored"), [(np.uint8, np.int16), (np.uint16, np.int32), (np.int8, np.int8), (bool, np.int8)]
)
def test_labels_are_stored_in_the_smallest_type_with_room_for_minus_one(tmp_path, given, stored):
    store = write(tmp_path / "s", ("ann", X, (Y > 0).astype(given)))
    assert store.read(0).y.dtype == stored


def test_labelled_rows_come_first_in_their_order(tmp_path):
    store = write(tmp_path / "s", ("ann", X, [-1, 1, -1, 0]))
    rows = store.read(0)
    np.testing.assert_array_equal(rows.x, X[[1, 3, 0, 2]])
    np.testing.assert_array_equal(rows.y, [1, 0, -1, -1])
    assert rows.labelled == 2
    assert rows.val_rows == rows.test_rows == -1


def test_a_sequence_is_unlabelled_only_if_every_entry_is(tmp_path):
    store = write(tmp_path / "s", ("ann", X[:3], [[-1, -1], [-1, 4], [2, 3]]))
    np.testing.assert_array_equal(store.read(0).y, [[-1, 4], [2, 3], [-1, -1]])


def test_the_split_of_the_data_counts_labelled_rows(tmp_path):
    """Training rows 0 to 2, validation rows 3 and 4, test rows 5 to 7, of each of which one has no label."""
    x = np.arange(8.0)[:, None]
    store = write(tmp_path / "s", ("ann", x, [0, -1, 2, 1, -1, -1, 0, 1], 2, 3))
    rows = store.read(0)
    assert rows.x[:, 0].tolist() == [0, 2, 3, 6, 7, 1, 4, 5]
    assert (rows.labelled, rows.val_rows, rows.test_rows) == (5, 1, 2)


def test_copies_in_other_processes_open_the_files_anew(tmp_path):
    store = write(tmp_path / "s", ("ann", np.zeros((1000, 100)), np.zeros(1000, dtype=int)))
    data = pickle.dumps(store)
    assert len(data) < 1000
    np.testing.assert_array_equal(pickle.loads(data).read(0).x, store.read(0).x)


def test_a_hundred_thousand_clients_are_opened_without_reading_rows(tmp_path):
    """Files of 8 GB, all holes: reading a fraction of them would show in the memory, reading them all in the time."""
    clients, per_client = 100_000, 100
    rows = clients * per_client
    np.lib.format.open_memmap(tmp_path / "x.npy", "w+", np.uint8, (rows, 28, 28))
    np.lib.format.open_memmap(tmp_path / "y.npy", "w+", np.int16, (rows,))
    np.save(tmp_path / "offsets.npy", np.arange(clients + 1) * per_client)
    np.save(tmp_path / "labelled.npy", np.full(clients, per_client))
    np.save(tmp_path / "val_rows.npy", np.full(clients, -1))
    np.save(tmp_path / "test_rows.npy", np.full(clients, -1))
    np.save(tmp_path / "roles.npy", np.zeros(clients, dtype=np.int8))
    np.save(tmp_path / "names.npy", np.char.encode(np.arange(clients).astype(str)))
    meta = {"version": FORMAT_VERSION, "clients": clients, "rows": rows, "num_classes": 62}
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    tracemalloc.start()
    store = ClientStore.open(tmp_path)
    assert store.read(77_777).x.shape == (100, 28, 28)
    assert store.name(99_999) == "99999"
    opened = tracemalloc.get_traced_memory()[1]
    federation = Federation(store)
    assert (federation.train_sizes == 70).all()
    federation.split(99_999)
    split, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert opened < 1e6
    assert split < 50 * clients
    assert peak < 200 * clients


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failed_writer_leaves_nothing(tmp_path, error):
    def clients():
        yield "ann", X, Y
        raise error

    with pytest.raises(error):
        write(tmp_path / "s", *clients())
    with pytest.raises(DataError):
        write(tmp_path / "s", ("ann", X, Y), ("bob", X, Y[:1]))
    assert list(tmp_path.iterdir()) == []


def test_a_killed_writer_leaves_no_store_and_is_not_in_the_way(tmp_path):
    def die():
        with ClientStoreWriter(tmp_path / "s") as writer:
            writer.add("ann", X, Y)
            os.kill(os.getpid(), signal.SIGKILL)

    process = multiprocessing.get_context("fork").Process(target=die)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert not (tmp_path / "s").exists()
    assert len(list(tmp_path.iterdir())) == 1
    assert len(write(tmp_path / "s", ("ann", X, Y), ("bob", X, Y))) == 2


def test_an_interrupted_build_is_named_and_starts_again(tmp_path):
    class Data(SyntheticData):
        def clients(self):
            for number, client in enumerate(super().clients()):
                if number == 2 and not (tmp_path / "again").exists():
                    os.kill(os.getpid(), signal.SIGKILL)
                yield client

    process = multiprocessing.get_context("fork").Process(
        target=lambda: Data(num_clients=4, cache_dir=str(tmp_path / "cache")).prepare_data()
    )
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    (left,) = (tmp_path / "cache").iterdir()
    (tmp_path / "again").touch()
    data = Data(num_clients=4, cache_dir=str(tmp_path / "cache"), cohort_size=1)
    with pytest.warns(UserWarning, match=rf"{left} was left by a process that was killed .* written from the start"):
        data.prepare_data()
    data.setup("fit")
    assert len(data.federation.store) == 4


def test_of_two_writers_of_one_store_the_first_to_finish_wins(tmp_path):
    with ClientStoreWriter(tmp_path / "s") as slow:
        slow.add("ann", X, Y)
        write(tmp_path / "s", ("bob", X, Y))
        slow.add("carl", X, Y)
    assert ClientStore.open(tmp_path / "s").name(0) == "bob"
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


def test_a_folder_that_cannot_be_written_to(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(ConfigurationError, match=r"cannot be written .*set cache_dir"),
        ClientStoreWriter(tmp_path / "file" / "s"),
    ):
        pass


@pytest.mark.parametrize("full", ["x.npy", "y.npy", "offsets.npy", "meta.json"])
@pytest.mark.parametrize("rows", [4, 400_000])
def test_a_full_disk(tmp_path, monkeypatch, full, rows):
    """`/dev/full` takes no byte; small files meet it when they are closed, large ones when they are written."""
    opened = Path.open
    monkeypatch.setattr(
        Path,
        "open",
        lambda self, *args, **kwargs: opened(Path("/dev/full") if self.name == full else self, *args, **kwargs),
    )
    with pytest.raises(ConfigurationError, match=r"store .* cannot be written \(.*No space left.*set cache_dir"):
        write(tmp_path / "s", ("ann", np.zeros((rows, 3)), np.zeros(rows, dtype=int)))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["x", "y", "offsets", "labelled", "val_rows", "test_rows", "roles", "names", "meta"])
@pytest.mark.parametrize("damage", ["missing", "empty", "truncated", "garbage"])
def test_damage_is_named_with_its_remedy(tmp_path, name, damage):
    write(tmp_path / "s", ("ann", X, Y), ("bob", X, Y))
    file = tmp_path / "s" / (name + (".json" if name == "meta" else ".npy"))
    content = file.read_bytes()
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes({"empty": b"", "truncated": content[:-1], "garbage": b"\x80" * len(content)}[damage])
    message = f"{re.escape(str(file))} is not a usable part .*: delete {re.escape(str(file.parent))}, it will be"
    with pytest.raises(DataError, match=message):
        ClientStore.open(tmp_path / "s")


def test_files_of_different_stores_do_not_mix(tmp_path):
    write(tmp_path / "s", ("ann", X, Y), ("bob", X, Y))
    write(tmp_path / "t", ("ann", X, Y), ("bob", X[:2], Y[:2]), ("carl", X[:2], Y[:2]))
    (tmp_path / "s" / "names.npy").write_bytes((tmp_path / "t" / "names.npy").read_bytes())
    with pytest.raises(DataError, match=r"names.npy .*shape \(3,\) instead of 2 entries"):
        ClientStore.open(tmp_path / "s")
    write(tmp_path / "u", ("ann", X, Y), ("bob", X[:2], Y[:2]))
    (tmp_path / "u" / "offsets.npy").write_bytes((tmp_path / "s" / "offsets.npy").read_bytes())
    with pytest.raises(DataError, match=r"offsets.npy .*it ends at 8, not at 6"):
        ClientStore.open(tmp_path / "u")


def test_a_store_of_another_version_is_not_read(tmp_path):
    write(tmp_path / "s", ("ann", X, Y))
    meta = json.loads((tmp_path / "s" / "meta.json").read_text())
    (tmp_path / "s" / "meta.json").write_text(json.dumps(meta | {"version": 99}))
    with pytest.raises(DataError, match=rf"version 99 instead of {FORMAT_VERSION}.*delete"):
        ClientStore.open(tmp_path / "s")


NAN = X.copy()
NAN[2, 1] = np.nan


@pytest.mark.parametrize(
    ("client", "message"),
    [
        (("bob", X[:0], Y[:0]), "client 'bob' has no rows: leave it out"),
        (("bob", X, Y[:3]), r"client 'bob' has features \(4, 3\) and labels \(3,\): there must be one label"),
        (("bob", X, 3), r"client 'bob' has features \(4, 3\) and labels \(\)"),
        (("ann", X, Y), "client 'ann' comes twice: give every client a unique name"),
        (("bob", X[:, :2], Y), r"'bob' has features of shape \(2,\) and type float32: .* have shape \(3,\)"),
        (("bob", X.astype(int), Y), "'bob' has features of shape .* and type int64: .* type float32; make them equal"),
        (("bob", X, Y[:, None]), r"'bob' has labels of shape \(1,\) .*before it have shape \(\)"),
        (("bob", NAN, Y), "'bob' has a NaN or an infinite value in row 2: clean that row"),
        (("bob", -np.inf * np.ones_like(X), Y), "'bob' has a NaN or an infinite value in row 0"),
        (("bob", X.astype(str), Y), "'bob' has features of type <U32: encode them as numbers"),
        (("bob", X, Y / 2), "'bob' has labels of type float64: encode them as integers"),
        (("bob", X, [0, 1, -2, 0]), "'bob' has the label -2 in row 2: expected 0 to 4 .num_classes is 5., -1 = to"),
        (("bob", X, [0, 1, 1, 5]), r"'bob' has the label 5 in row 3: expected 0 to 4 \(num_classes is 5\)"),
        (("bob", X, [-1, -1, -1, -1]), "'bob' has no labelled row: leave it out, or give it a label"),
        (("bob", X, Y, 3, 1), "'bob' has 4 rows of 4 for validation and testing: its own split must leave a labelled"),
        (("bob", X, Y, None, -1), "'bob' has -1 rows of 4 for validation and testing"),
        (("bob", X, [-1, 0, 0, 0], None, 3), "'bob' has no labelled row among the 1 to train on, beside 3 for"),
    ],
)
def test_unusable_clients_are_named_with_the_remedy(tmp_path, client, message):
    with pytest.raises(DataError, match=message):
        write(tmp_path / "s", ("ann", X, Y), client, num_classes=5)


def test_the_file_of_an_unusable_client_is_named(tmp_path):
    with pytest.raises(DataError, match=r"^shard.json: client 'bob' has no rows: leave it out"):
        write(tmp_path / "s", ("bob", X[:0], Y[:0], None, None, "train", "shard.json"))


def test_roles_are_kept(tmp_path):
    store = write(
        tmp_path / "s", ("ann", X, Y), ("bob", X, Y, None, None, "test"), ("carl", X, Y, None, 2, "validation")
    )
    assert store.roles.tolist() == [0, 2, 1]


def test_labels_without_a_known_number_of_classes_have_no_upper_limit(tmp_path):
    assert write(tmp_path / "s", ("ann", X, [0, 1, 1, 5])).meta.num_classes == 6
    with pytest.raises(DataError, match="the label -3 in row 0: expected 0 or more, -1 = to be predicted"):
        write(tmp_path / "t", ("ann", X, [-3, 1, 1, 5]))


def test_a_data_set_without_clients(tmp_path):
    with pytest.raises(DataError, match=r"no client to write .*check its source"):
        write(tmp_path / "s")


def test_bytes_of_two_levels_become_truth_values(tmp_path):
    bits = (np.arange(12).reshape(4, 3) % 2).astype(np.uint8)
    for largest, dtype in ((1, np.bool_), (2, np.uint8)):
        clients = [("ann", bits, Y), ("bob", bits * np.uint8(largest), Y)]
        store = write(tmp_path / str(largest), *clients)
        assert store.feature_dtype == dtype
        assert store.read(1).x.astype(int).tolist() == (bits * largest).tolist()


def test_names_of_classes_are_kept(tmp_path):
    with ClientStoreWriter(tmp_path / "s") as writer:
        writer.add("ann", X, Y)
        writer.class_names = ["oak", "äsh", "elm", "fir", "yew", "box"]
    meta = ClientStore.open(tmp_path / "s").meta
    assert (meta.num_classes, meta.class_names) == (6, ("oak", "äsh", "elm", "fir", "yew", "box"))


def test_a_value_that_single_precision_does_not_hold(tmp_path):
    with pytest.raises(DataError, match=r"'ann' has a value in row 2 that is larger than the largest float32, 3.40"):
        write(tmp_path / "s", ("ann", np.where(np.isnan(NAN), 1e39, X.astype(float)), Y))
