import gzip
import json
import os
from pathlib import Path

import numpy as np
import pytest
from published_formats import emnist, reddit, write_leaf

from flow_pl.data import CharacterAfterWindow, Images, LeafData, NextCharacter, NextWord, TokenSequences, Vectors
from flow_pl.data.readers.leaf import LeafSource
from flow_pl.data.readers.sources import Selection
from flow_pl.errors import DataError

SETTINGS = {"val_fraction": 0, "new_client_fraction": 0}


def prepared(data):
    data.prepare_data()
    data.setup()
    return data


@pytest.fixture
def make(tmp_path):
    def make(**settings):
        return prepared(LeafData(**{"cache_dir": str(tmp_path / "cache"), **SETTINGS} | settings))

    return make


def contents(data):
    store = data.federation.store
    return {store.name(client): store.read(client).y.tolist() for client in range(len(store))}


def numbers(*labels):
    return {"x": [[float(label), 1.0] for label in labels], "y": list(labels)}


def test_synthetic(tmp_path, make):
    train = write_leaf(tmp_path / "data.json", {"0": numbers(1, 2, 0), "1": numbers(3)})
    data = make(train=train, encoding=Vectors())
    assert contents(data) == {"0": [1, 2, 0], "1": [3]}
    assert data.federation.store.read(0).x.tolist() == [[1, 1], [2, 1], [0, 1]]
    assert data.num_classes == 4


def test_femnist_in_many_shards(tmp_path, make):
    """Shards of a folder, some of them packed, with `hierarchies` or without."""

    def picture(*labels):
        return {"x": emnist(*labels)["pixels"].reshape(-1, 784).tolist(), "y": list(labels)}

    for part, shift in (("train", 0), ("test", 10)):
        folder = tmp_path / part
        write_leaf(folder / "all_data_1.json.gz", {"f2": picture(5 + shift)}, hierarchies=["hsf_0"])
        write_leaf(folder / "all_data_0.json", {"f1": picture(1 + shift, 2), "f0": picture(3 + shift)})
        (folder / "notes.txt").write_text("")
    images = Images("x", "y", num_classes=62)
    data = make(train=str(tmp_path / "train"), test=str(tmp_path / "test"), encoding=images)
    assert contents(data) == {"f1": [1, 2, 11, 2], "f0": [3, 13], "f2": [5, 15]}
    assert data.federation.test_sizes.tolist() == [2, 1, 1]
    assert data.feature_shape == (1, 28, 28)


def test_shakespeare(tmp_path, make):
    text = "FIRST CITIZEN. Before we proceed any further, hear me speak. Speak, speak. You are all resolved."
    windows = {"x": [text[start : start + 80] for start in range(5)], "y": [text[start + 80] for start in range(5)]}
    train = write_leaf(tmp_path / "train.json", {"PLAY_ROLE": windows}, hierarchies=["PLAY"])
    data = make(train=train, encoding=CharacterAfterWindow())
    rows = data.federation.store.read(0)
    assert rows.x.shape == (5, 80)
    assert (np.asarray(rows.y)[:, :-1] == 0).all()
    np.testing.assert_array_equal(np.asarray(rows.y)[:4, -1], np.asarray(rows.x)[1:, -1])
    assert data.num_classes == 90


def test_reddit(tmp_path, make):
    """Its `num_samples` counts the comments of all parts."""
    users = {"1": reddit("hello there my friend", "one two three four five six seven eight nine"), "2": reddit("hello")}
    train = write_leaf(tmp_path / "train" / "reddit_0_train.json", users, num_samples=[4, 3])
    test = write_leaf(tmp_path / "test" / "reddit_0_test.json", {"1": reddit("hello unseen"), "2": reddit("my")})
    settings = {"train": train, "test": test, "encoding": TokenSequences(vocab_size=3)}
    data = make(**settings, check_samples=False)
    assert data.vocabularies["words"].tokens == ("hello", "eight", "five")
    assert contents(data)["1"][-1] == [4, 1, 3, 0, 0, 0, 0, 0, 0, 0]
    assert data.federation.store.sizes.tolist() == [3, 2]  # of the sequences of nine words the second has no target
    with pytest.raises(DataError, match="client '1' has 2 examples, but its `num_samples` is 4"):
        make(**settings)


def test_test_clients_come_in_any_order(tmp_path, make):
    train = {"a": numbers(1), "b": numbers(2), "c": numbers(3), "d": numbers(4)}
    test = {"z": numbers(9), "c": numbers(7), "b": numbers(6), "a": numbers(5)}
    files = [write_leaf(tmp_path / f"{name}.json", {name: data}) for name, data in test.items()]
    data = make(train=write_leaf(tmp_path / "train.json", train), test=files, encoding=Vectors())
    assert contents(data) == {"a": [1, 5], "b": [2, 6], "c": [3, 7], "d": [4], "z": [9]}
    assert data.federation.new.tolist() == [4]


def test_test_clients_in_the_same_order_are_not_kept_in_memory(tmp_path):
    users = {str(user): numbers(user) for user in range(50)}
    source = LeafSource([Path(write_leaf(tmp_path / "test.json", users))], Selection(("x", "y")))
    for user in range(1, 50, 2):
        assert source.take(str(user)).columns["y"] == [user]
        assert len(source._early) == (user + 1) // 2  # those passed over
    assert source.take("99") is None
    assert [client.name for client in source] == [str(user) for user in range(0, 50, 2)]


def test_users_may_stand_behind_the_data(tmp_path, make):
    (tmp_path / "test.json").write_text(
        '{"user_data": {"a": {"x": [[1]], "y": [2]}}, "num_samples": [1], "users": ["a"]}'
    )
    train = write_leaf(tmp_path / "train.json", {"a": {"x": [[1]], "y": [1]}})
    assert contents(make(train=train, test=str(tmp_path / "test.json"), encoding=Vectors())) == {"a": [1, 2]}


def test_examples_are_capped_and_clients_drawn(tmp_path, make):
    train = write_leaf(tmp_path / "train.json", {str(user): numbers(1, 2, 3) for user in range(40)})
    data = make(train=train, encoding=Vectors(), max_examples=2, client_fraction=0.5)
    assert 10 <= len(data.federation.store) <= 30
    assert set(data.federation.store.sizes.tolist()) == {2}


def shard(**changes):
    whole = {"users": ["ann", "bob"], "num_samples": [2, 1], "user_data": {"ann": numbers(1, 2), "bob": numbers(3)}}
    return whole | changes


@pytest.mark.parametrize(
    ("shard", "message"),
    [
        (
            shard(users=["ann", "bob", "eve"], num_samples=[2, 1, 1]),
            "client 'eve' is not in `user_data`: correct the file",
        ),
        (shard(users=["ann"], num_samples=[2]), "client 'bob' is not in `users`: correct the file"),
        (shard(num_samples=[2]), "`users` and `num_samples` must be lists of equal length"),
        (shard(num_samples=None), "`users` and `num_samples` must be lists of equal length"),
        (shard(num_samples=[2, 5]), "client 'bob' has 1 examples, but its `num_samples` is 5"),
        (
            shard(user_data={"ann": numbers(1, 2), "bob": {"x": [[1, 1]], "y": [1, 2]}}),
            "client 'bob' has columns of different lengths, {'x': 1, 'y': 2}",
        ),
        (shard(user_data={"ann": numbers(1, 2), "bob": {"x": [[1]]}}), "client 'bob' has no y, only x: correct"),
        (shard(user_data={"ann": numbers(1, 2), "bob": 3}), "client 'bob' is not an object of lists"),
        (shard(user_data={"ann": numbers(1, 2), "bob": numbers()}), "client 'bob' has no examples: .*unusable_clients"),
        (
            shard(user_data={"ann": numbers(1, 2), "bob": {"x": [[1, 2, 3]], "y": [1]}}),
            r"client 'bob' has features of shape",
        ),
    ],
)
def test_shards_that_do_not_agree_with_themselves(tmp_path, make, shard, message):
    (tmp_path / "shard_0.json").write_text(json.dumps(shard))
    with pytest.raises(DataError, match=rf"shard_0.json: {message}"):
        make(train=str(tmp_path / "shard_0.json"), encoding=Vectors())
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize("ending", [".json", ".json.gz"])
@pytest.mark.parametrize("share", [0.01, 0.3, 0.95])
def test_a_shard_that_is_truncated(tmp_path, make, ending, share):
    path = Path(write_leaf(tmp_path / f"shard{ending}", {str(user): numbers(*range(9)) for user in range(50)}))
    os.truncate(path, int(path.stat().st_size * share))
    with pytest.raises(
        DataError, match=rf"shard{ending} is not a complete LEAF file \(.*\): get it again, or correct it"
    ):
        make(train=str(path), encoding=Vectors())
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_shard_that_is_not_packed(tmp_path, make):
    (tmp_path / "shard.json.gz").write_text("{}")
    with pytest.raises(DataError, match=r"shard.json.gz is not a complete LEAF file"):
        make(train=str(tmp_path / "shard.json.gz"), encoding=Vectors())
    (tmp_path / "shard.json.gz").write_bytes(gzip.compress(b"\xff\xfe{}"))
    with pytest.raises(DataError, match=r"shard.json.gz is not a complete LEAF file"):
        make(train=str(tmp_path / "shard.json.gz"), encoding=Vectors())


def test_paths_without_shards(tmp_path, make):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"the folder .*empty has no .json or .json.gz file"):
        make(train=str(tmp_path / "empty"), encoding=Vectors())
    with pytest.raises(DataError, match=r"there is no file .*nowhere.json"):
        make(train=str(tmp_path / "nowhere.json"), encoding=Vectors())


SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"


def needs(*names):
    return pytest.mark.skipif(
        not all((SHARED / name).exists() for name in names), reason=f"needs {' and '.join(names)} in shared/data"
    )


@needs("shakespeare_leaf_small_train.json.gz", "shakespeare_leaf_small_test.json.gz")
def test_roles_of_shakespeare_in_leafs_form(make):
    train, test = (str(SHARED / f"shakespeare_leaf_small_{part}.json.gz") for part in ("train", "test"))
    data = make(train=train, test=test, encoding=CharacterAfterWindow())
    assert len(data.federation.store) == 24
    assert (data.federation.train_sizes.sum(), data.federation.test_sizes.sum()) == (8273, 1838)


@needs("shakespeare_roles.json.gz")
def test_utterances_of_shakespeares_roles(make):
    train = str(SHARED / "shakespeare_roles.json.gz")
    data = make(train=train, encoding=NextCharacter("x"), client_fraction=0.1)
    assert 70 <= len(data.federation.store) <= 130
    assert data.federation.store.feature_shape == (80,)


@needs("stackexchange_posts_small.json.gz")
def test_sentences_of_stack_exchange(make):
    data = make(train=str(SHARED / "stackexchange_posts_small.json.gz"), encoding=NextWord("x"))
    assert len(data.federation.store) == 45
    assert data.federation.store.meta.rows == 1729
    y = np.concatenate([data.federation.store.read(client).y for client in range(45)])
    assert ((y == 0) == (np.cumsum(y == 0, axis=1) > 0)).all()  # nothing but padding behind the first padding
    assert (y == 1).mean() < 0.01


def test_a_byte_order_mark_and_copies_of_macos(tmp_path, make):
    folder = tmp_path / "train"
    path = Path(write_leaf(folder / "a.json", {"0": numbers(1, 2)}))
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    packed = Path(write_leaf(folder / "b.json", {"1": numbers(0)}))
    (folder / "b.json.gz").write_bytes(gzip.compress(b"\xef\xbb\xbf" + packed.read_bytes().replace(b"{", b"\r\n{")))
    packed.unlink()
    (folder / "._a.json").write_bytes(b"\0\5\x16\7")
    (folder / ".DS_Store").write_bytes(b"\0")
    assert contents(make(train=str(folder), encoding=Vectors())) == {"0": [1, 2], "1": [0]}


def test_a_client_without_a_label(tmp_path, make):
    train = write_leaf(tmp_path / "a.json", {"0": numbers(1, 2), "1": numbers(-1, -1), "2": numbers(0)})
    with pytest.raises(DataError, match=r"a.json: client '1' has no labelled row: .*set unusable_clients to skip"):
        make(train=train, encoding=Vectors())
    with pytest.warns(UserWarning, match=r"clients left out.*: 1 \(1\)"):
        data = make(train=train, encoding=Vectors(), unusable_clients="skip")
    assert contents(data) == {"0": [1, 2], "2": [0]}
