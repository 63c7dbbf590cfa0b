import logging
import pickle

import numpy as np
import pytest

from flow_pl.data import Federation
from flow_pl.errors import ConfigurationError

SIZES = [1, 2, 3, 4, 5, 9, 10, 25, 100, 333]


@pytest.mark.parametrize(("val", "test"), [(0, 0), (0.1, 0.2), (0.1, 0), (0, 0.2), (0.45, 0.5), (0.01, 0.98)])
def test_splits_are_disjoint_and_cover_the_labelled_rows(make_store, val, test):
    unlabelled = [0, 1, 0, 2, 0, 3, 0, 4, 0, 5]
    store = make_store([n + u for n, u in zip(SIZES, unlabelled, strict=True)], unlabelled)
    federation = Federation(store, val_fraction=val, test_fraction=test)
    for client, (size, extra) in enumerate(zip(SIZES, unlabelled, strict=True)):
        split = federation.split(client)
        rows = np.concatenate([split.train, split.val, split.test])
        np.testing.assert_array_equal(np.sort(rows), np.arange(size))
        np.testing.assert_array_equal(split.unlabelled, np.arange(size, size + extra))
        assert len(split.train) == federation.train_sizes[client] >= 1
        assert len(split.val) == federation.val_sizes[client] == federation.heldout_sizes("val")[client]
        assert len(split.test) == federation.test_sizes[client] == federation.heldout_sizes("test")[client]
        assert len(split.heldout("predict")) == federation.heldout_sizes("predict")[client] == len(split.test) + extra
        assert (len(split.test) > 0) == (test > 0 and size >= 2)
        assert (len(split.val) > 0) == (val > 0 and size >= 3)
        assert (np.diff(split.train) > 0).all()


def test_sizes_follow_the_formula(make_store):
    """Test and validation rows are the nearest integers, halves up, and at least one where there is room."""
    federation = Federation(make_store(SIZES), val_fraction=0.1, test_fraction=0.2)
    #                                       1  2  3  4  5  9 10 25 100 333
    assert federation.test_sizes.tolist() == [0, 1, 1, 1, 1, 2, 2, 5, 20, 67]
    assert federation.val_sizes.tolist() == [0, 0, 1, 1, 1, 1, 1, 3, 10, 33]
    assert federation.train_sizes.tolist() == [1, 1, 1, 2, 3, 6, 7, 17, 70, 233]


def test_splits_depend_on_the_seed_and_the_client_alone(make_store):
    store = make_store([50, 50])
    first, again, other = (Federation(store, split_seed=seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first.split(1).test, again.split(1).test)
    assert first.split(1).test.tolist() != first.split(0).test.tolist()
    assert first.split(1).test.tolist() != other.split(1).test.tolist()


def test_the_split_of_the_data_is_kept(make_store):
    store = make_store([10, 12, 10], unlabelled=[0, 2, 0], test_rows=[3, 5, None])
    federation = Federation(store, val_fraction=0.2, test_fraction=0.5)
    for client in (0, 1):
        split = federation.split(client)
        np.testing.assert_array_equal(split.test, [7, 8, 9])
        np.testing.assert_array_equal(np.sort(np.concatenate([split.train, split.val])), np.arange(7))
        assert len(split.val) == 2
    assert federation.split(0).val.tolist() != federation.split(1).val.tolist()
    assert federation.split(1).unlabelled.tolist() == [10, 11]
    assert federation.test_sizes.tolist() == [3, 3, 5]


def test_the_split_of_the_data_may_leave_one_row_to_train_on(make_store):
    federation = Federation(make_store([5, 2], test_rows=[4, 0]), val_fraction=0.5, test_fraction=0.4)
    assert (federation.train_sizes.tolist(), federation.val_sizes.tolist()) == ([1, 2], [0, 0])
    assert federation.test_sizes.tolist() == [4, 0]


@pytest.mark.parametrize(("fraction", "count"), [(0, 0), (0.1, 1), (0.25, 3), (0.99, 9)])
def test_new_clients_are_a_share_of_all_and_some_are_seen(make_store, fraction, count):
    federation = Federation(make_store([4] * 10), new_client_fraction=fraction)
    assert len(federation.new) == count
    assert sorted([*federation.seen, *federation.new]) == list(range(10))
    assert [federation.population(client) for client in federation.new] == ["new"] * count
    assert {federation.population(client) for client in federation.seen} == {"seen"}


def test_the_roles_that_the_data_gives_are_kept(make_store):
    store = make_store([4] * 6, roles=["train", "test", "validation", "train", "test", "train"])
    federation = Federation(store, new_client_fraction=0.9)
    assert federation.seen.tolist() == [0, 3, 5]
    assert federation.new.tolist() == [1, 4]
    assert federation.validation.tolist() == [2]
    assert [federation.population(client) for client in range(3)] == ["seen", "new", "validation"]


def test_new_clients_are_drawn_where_the_data_names_none(make_store):
    federation = Federation(make_store([4] * 4, roles=["train", "validation", "train", "train"]))
    assert (len(federation.seen), len(federation.new), federation.validation.tolist()) == (3, 0, [1])
    federation = Federation(federation.store, new_client_fraction=0.4)
    assert len(federation.new) == 1
    assert 1 not in federation.new


def test_new_clients_depend_on_the_split_seed(make_store):
    store = make_store([4] * 40)
    new = [Federation(store, new_client_fraction=0.5, split_seed=seed).new.tolist() for seed in (0, 0, 1)]
    assert new[0] == new[1] != new[2]


def test_small_clients_are_left_out(make_store, caplog):
    store = make_store([4, 3, 4, 1, 6], unlabelled=[0, 0, 1, 0, 0])
    with caplog.at_level(logging.INFO):
        federation = Federation(store, min_examples=4, new_client_fraction=0.5)
    assert sorted([*federation.seen, *federation.new]) == [0, 4]
    assert federation.population(3) == "left out"
    assert "3 of 5 clients have fewer than 4 examples: left out" in caplog.text


def test_copies_for_workers_are_small(make_store):
    federation = Federation(make_store([50] * 10))
    data = pickle.dumps(federation)
    assert len(data) < 2500
    np.testing.assert_array_equal(pickle.loads(data).split(3).train, federation.split(3).train)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"val_fraction": -0.1}, r"val_fraction is -0.1, expected a share of at least 0 and less than 1"),
        ({"test_fraction": 1}, "test_fraction is 1, expected"),
        ({"new_client_fraction": 1.5}, "new_client_fraction is 1.5, expected"),
        ({"val_fraction": 0.5, "test_fraction": 0.5}, "leave nothing to train on: their sum must be less than 1"),
        ({"min_examples": 0}, "min_examples is 0, expected a whole number of 1 or more"),
        ({"min_examples": 6}, "min_examples is 6, but no client has more than 5 labelled rows: lower it"),
    ],
)
def test_settings_that_cannot_work(make_store, settings, message):
    with pytest.raises(ConfigurationError, match=message):
        Federation(make_store([3, 5]), **settings)


def test_clients_to_train_on_may_not_all_be_left_out(make_store):
    with pytest.raises(ConfigurationError, match="min_examples is 4, but no client to train on has as many"):
        Federation(make_store([3, 5], roles=["train", "test"]), min_examples=4)
