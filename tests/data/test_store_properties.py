"""Any clients come back from a store as they were written, split without a row lost."""

import tempfile
from pathlib import Path

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from flow_pl.data import ClientStore, ClientStoreWriter, Federation

QUICK = settings(derandomize=True, deadline=None, max_examples=15, database=None)

# a client: its labels, -1 = none, of which one at least is there
LABELS = st.lists(st.integers(-1, 9), min_size=1, max_size=12).filter(lambda labels: max(labels) >= 0)
CLIENTS = st.dictionaries(st.text("aZ0-_ü漢", min_size=1, max_size=6), LABELS, min_size=1, max_size=5)
FRACTIONS = st.sampled_from([(0, 0), (0.1, 0.2), (0.5, 0), (0, 0.5), (0.3, 0.6), (0.01, 0.98)])


def written(folder, clients, shape=(), dtype=np.float32, heldout=(None, None)):
    """A store whose rows count upwards from one client to the next, and those rows."""
    first, rows = 0, {}
    with ClientStoreWriter(Path(folder) / "store") as writer:
        for name, labels in clients.items():
            size = int(np.prod((len(labels), *shape)))
            x = (np.arange(first, first + size) % 100).reshape(len(labels), *shape).astype(dtype)
            writer.add(name, x, np.array(labels), *heldout)
            first, rows[name] = first + size, x
    return ClientStore.open(Path(folder) / "store"), rows


@QUICK
@given(
    clients=CLIENTS,
    shape=st.sampled_from([(1,), (3,), (2, 2)]),
    dtype=st.sampled_from([np.uint8, np.int64, np.float16, np.float64]),
)
def test_any_clients_come_back(clients, shape, dtype):
    """Features, labels and names; rows with a label first, each group in its order."""
    with tempfile.TemporaryDirectory() as folder:
        store, rows = written(folder, clients, shape, dtype)
        assert [store.name(client) for client in range(len(store))] == list(clients)
        assert store.sizes.tolist() == [len(labels) for labels in clients.values()]
        # whole numbers that are 0 and 1 alone take the room of truth values
        binary = dtype == np.uint8 and max(x.max() for x in rows.values()) <= 1
        assert store.feature_dtype == (bool if binary else dtype)
        assert store.meta.num_classes == 1 + max(map(max, clients.values()))
        for client, (name, labels) in enumerate(clients.items()):
            order = [i for i, y in enumerate(labels) if y >= 0] + [i for i, y in enumerate(labels) if y < 0]
            read = store.read(client)
            assert read.x.dtype == store.feature_dtype
            np.testing.assert_array_equal(read.x, rows[name][order])
            assert read.y.tolist() == [labels[i] for i in order]
            assert read.labelled == sum(y >= 0 for y in labels)


@QUICK
@given(clients=CLIENTS, fractions=FRACTIONS, new=st.sampled_from([0, 0.3, 0.9]), seed=st.integers(0, 2**31))
def test_every_row_is_in_one_part_and_every_client_in_one_population(clients, fractions, new, seed):
    with tempfile.TemporaryDirectory() as folder:
        store, _ = written(folder, clients, (1,))
        federation = Federation(
            store, val_fraction=fractions[0], test_fraction=fractions[1], new_client_fraction=new, split_seed=seed
        )
        for client, labels in enumerate(clients.values()):
            split = federation.split(client)
            # as a sorted list: a row that is missing or in two parts changes it
            assert sorted(row for part in split for row in part.tolist()) == list(range(len(labels)))
            assert len(split.unlabelled) == sum(y < 0 for y in labels)
            sizes = [part[client] for part in (federation.train_sizes, federation.val_sizes, federation.test_sizes)]
            assert [len(split.train), len(split.val), len(split.test)] == sizes
            assert len(split.train) >= 1
            for part, fraction in ((split.val, fractions[0]), (split.test, fractions[1])):
                assert (len(part) > 0) <= (fraction > 0)
        populations = [*federation.seen, *federation.new, *federation.validation]
        assert sorted(populations) == list(range(len(clients)))
        assert len(federation.seen) >= 1


@QUICK
@given(clients=CLIENTS, data=st.data(), seed=st.integers(0, 9))
def test_rows_that_the_data_holds_out_are_never_trained_on(clients, data, seed):
    clients = {name: [abs(y) for y in labels] for name, labels in clients.items()}
    smallest = min(map(len, clients.values()))
    val = data.draw(st.integers(0, smallest - 1))
    test = data.draw(st.integers(0, smallest - 1 - val))
    with tempfile.TemporaryDirectory() as folder:
        store, _ = written(folder, clients, (1,), heldout=(val, test))
        federation = Federation(store, val_fraction=0.1, test_fraction=0.2, split_seed=seed)
        for client, labels in enumerate(clients.values()):
            split, n = federation.split(client), len(labels)
            assert split.train.tolist() == list(range(n - val - test))
            assert split.val.tolist() == list(range(n - val - test, n - test))
            assert split.test.tolist() == list(range(n - test, n))
