"""How the parts of published data belong together, and which clients a vocabulary is counted from."""

import numpy as np
import pytest
from published_formats import reddit, write_leaf

from flow_pl.data import LeafData, NextCharacter, NextWord, TokenSequences, Vectors
from flow_pl.data.readers.sources import new_clients
from flow_pl.errors import ConfigurationError, DataError

NAMES = [f"user_{number}" for number in range(40)]


@pytest.fixture
def make(tmp_path):
    """LEAF files of the clients of each part."""

    def make(encoding=None, **settings):
        for part in ("train", "validation", "test", "heldout"):
            if isinstance(settings.get(part), dict):
                settings[part] = write_leaf(tmp_path / f"{part}.json", settings[part])
        settings = {"cache_dir": str(tmp_path / "cache"), "val_fraction": 0, "new_client_fraction": 0, **settings}
        data = LeafData(encoding=encoding or Vectors(), **settings)
        data.prepare_data()
        data.setup()
        return data

    return make


def numbers(*labels):
    return {"x": [[float(label)] for label in labels], "y": list(labels)}


def split(data, name):
    """Labels of a client's rows for training, validation and testing."""
    store = data.federation.store
    client = [store.name(client) for client in range(len(store))].index(name)
    y, rows = store.read(client).y, data.federation.split(client)
    return [sorted(y[part].tolist()) for part in (rows.train, rows.val, rows.test)]


def test_every_part_of_a_client_is_used_for_what_it_is(make):
    """Whatever the shares say, which are for data without such parts."""
    train = {"ann": numbers(1, 2, 3), "bob": numbers(4), "carl": numbers(5, 6)}
    validation, test = {"ann": numbers(7), "carl": numbers(8, 9)}, {"ann": numbers(10, 11), "bob": numbers(12)}
    data = make(train=train, validation=validation, test=test, val_fraction=0.4, test_fraction=0.5)
    assert split(data, "ann") == [[1, 2, 3], [7], [10, 11]]
    assert split(data, "bob") == [[4], [], [12]]
    assert split(data, "carl") == [[5, 6], [8, 9], []]
    assert data.federation.seen.tolist() == [0, 1, 2]
    assert len(data.federation.validation) == 0
    (batch,) = data.val_dataloader()
    assert sorted(batch.client.tolist()) == [0, 2]


def test_a_part_that_is_not_given_is_cut_from_the_training_examples(make):
    train = {"ann": numbers(*range(10))}
    validated = make(train=train, validation={"ann": numbers(20, 21)}, val_fraction=0.3, test_fraction=0.25)
    rows = split(validated, "ann")
    assert rows[1] == [20, 21]
    assert (len(rows[0]), len(rows[2])) == (7, 3)  # a quarter of all twelve
    assert sorted(rows[0] + rows[2]) == list(range(10))
    tested = make(train=train, test={"ann": numbers(20, 21)}, val_fraction=0.25, test_fraction=0.3)
    rows = split(tested, "ann")
    assert rows[2] == [20, 21]
    assert (len(rows[0]), len(rows[1])) == (7, 3)


def test_clients_without_training_examples(make):
    """In the validation part alone: evaluated after a round. Listed for training without an example: new."""
    train = {"ann": numbers(1, 2), "bob": numbers(), "carl": numbers(), "dan": numbers()}
    validation = {"bob": numbers(3), "carl": numbers(4), "vera": numbers(*range(20, 24))}
    test = {"bob": numbers(5, 6), "dan": numbers(*range(7, 11))}
    data = make(train=train, validation=validation, test=test, test_fraction=0.25)
    assert split(data, "bob") == [[3], [], [5, 6]]
    assert [len(part) for part in split(data, "dan")] == [3, 0, 1]
    assert split(data, "carl") == [[4], [], []]
    names = {
        population: [data.client_name(client) for client in getattr(data.federation, population)]
        for population in ("seen", "new", "validation")
    }
    assert names == {"seen": ["ann"], "new": ["bob", "carl", "dan"], "validation": ["vera"]}


def test_validation_clients_of_their_own_may_not_have_the_names_of_training_clients(make):
    train = {"ann": numbers(1, 2)}
    with pytest.raises(DataError, match=r"validation.json: client 'ann' comes twice"):
        make(train=train, validation=train, test={"zoe": numbers(3)}, same_clients=False)


def test_users_of_reddit_are_in_three_folders(tmp_path, make):
    """LEAF writes every user to all of them, in shards of the same order; `num_samples` counts all three."""
    texts = {"train": "one two three", "val": "four five", "test": "six"}
    for part, words in texts.items():
        for shard, users in enumerate((["1", "2"], ["3", "4"])):
            data = {user: reddit(*words.split()) for user in users}
            write_leaf(tmp_path / part / f"reddit_{shard}_{part}.json", data, num_samples=[6, 6])
    folders = {"train": "train", "validation": "val", "test": "test"}
    settings = {part: str(tmp_path / folder) for part, folder in folders.items()}
    data = make(TokenSequences(vocab_size=9), **settings, check_samples=False)
    federation = data.federation
    assert [data.client_name(client) for client in federation.seen] == ["1", "2", "3", "4"]
    assert (federation.train_sizes == 3).all()
    assert (federation.val_sizes == 2).all()
    assert (federation.test_sizes == 1).all()
    assert data.vocabularies["words"].tokens == ("one", "three", "two")


@pytest.mark.parametrize("part", ["train", "test"])
def test_a_user_in_two_shards_of_a_part(tmp_path, make, part):
    """To put them together all users would have to be in memory."""
    users = {"ann": numbers(1), "bob": numbers(2)}
    for shard in "01":
        write_leaf(tmp_path / "shards" / f"{shard}.json", {**users, f"user_{shard}": numbers(3)})
    settings = {"train": users, part: str(tmp_path / "shards")}
    message = r"1.json: client 'ann' has examples in .*0.json, too: put all its examples of a part into one entry"
    with pytest.raises(DataError, match=message):
        make(**settings)


def test_a_user_twice_in_one_shard(tmp_path, make):
    entry = '"ann": {"x": [[1.0]], "y": [1]}'
    head = '{"users": ["ann", "ann"], "num_samples": [1, 1], "user_data": {'
    (tmp_path / "twice.json").write_text(f"{head}{entry}, {entry}}}}}")
    with pytest.raises(DataError, match=r"twice.json: client 'ann' has examples in .*twice.json, too"):
        make(train=str(tmp_path / "twice.json"))
    (tmp_path / "twice.json").write_text(f"{head}{entry}}}}}")
    with pytest.raises(DataError, match=r"twice.json: client 'ann' is more than once in `users`"):
        make(train=str(tmp_path / "twice.json"))


@pytest.mark.parametrize(("fraction", "count"), [(0, 0), (0.01, 0), (0.0125, 1), (0.25, 10), (0.99, 39)])
def test_new_clients_are_a_share_whatever_the_order(fraction, count):
    drawn = new_clients(NAMES, fraction, seed=0)
    assert len(drawn) == count
    assert drawn <= set(NAMES)
    assert new_clients(reversed(NAMES), fraction, seed=0) == drawn


def test_new_clients_depend_on_the_seed_and_a_larger_share_holds_a_smaller_one():
    drawn = [new_clients(NAMES, 0.5, seed) for seed in range(20)]
    assert len(set(drawn)) == 20
    assert new_clients(NAMES, 0.25, seed=3) < drawn[3]


def own_words():
    """Every user says a word of their own, and one that all say."""
    return {name: {"x": [f"{name} all", "all"] * 3} for name in NAMES}


def test_a_vocabulary_is_counted_from_the_clients_that_are_not_new(make):
    settings = {"encoding": NextWord("x", vocab_size=100), "train": own_words(), "new_client_fraction": 0.25}
    data = make(**settings)
    federation = data.federation
    assert len(federation.new) == 10
    seen = {data.client_name(client) for client in federation.seen}
    assert set(data.vocabularies["words"].tokens) == {"all", *seen}
    for client in range(len(federation.store)):  # an unknown word is number 1
        unknown = bool((np.asarray(federation.store.read(client).y) == 1).any())
        assert unknown == (federation.population(client) == "new")
    other = make(**settings, split_seed=1)
    assert other.federation.store.path != federation.store.path
    assert {other.client_name(client) for client in other.federation.seen} != seen


def test_test_examples_of_new_clients_stay_what_they_are(make):
    test = {name: {"x": ["all"]} for name in NAMES}
    data = make(NextWord("x", vocab_size=100), train=own_words(), test=test, new_client_fraction=0.25)
    federation = data.federation
    assert len(federation.new) == 10
    assert (federation.train_sizes == 6).all()
    assert (federation.test_sizes == 1).all()


@pytest.mark.parametrize("vocabulary", ["given", "characters", "counted", "own new clients"])
def test_new_clients_are_drawn_before_only_for_a_counted_vocabulary(tmp_path, make, vocabulary):
    (tmp_path / "words").write_text("\n".join(["all", *NAMES]))
    encoding = {
        "given": NextWord("x", vocabulary=str(tmp_path / "words")),
        "characters": NextCharacter("x", characters="user_0123456789 al"),
    }.get(vocabulary, NextWord("x"))
    settings = {"train": write_leaf(tmp_path / "all.json", own_words())}
    if vocabulary == "own new clients":
        settings["heldout"] = write_leaf(tmp_path / "new.json", {"zoe": {"x": ["all", "all"]}})
    made = [make(encoding, new_client_fraction=fraction, **settings) for fraction in (0.25, 0.5)]
    stores = {data.federation.store.path for data in made}
    assert len(stores) == (2 if vocabulary == "counted" else 1)
    expected = [1, 1] if vocabulary == "own new clients" else [10, 20]
    assert [len(data.federation.new) for data in made] == expected


def test_a_new_client_of_words_that_only_it_says(tmp_path, make):
    """Unknown tokens alone are an error that names the file and the client, or leave the client out."""
    train = write_leaf(tmp_path / "all.json", {name: {"x": [name]} for name in NAMES})
    settings = {"encoding": NextWord("x"), "train": train, "new_client_fraction": 0.25}
    message = r"all.json: client 'user_\d+' has only tokens that are not in the vocabulary: .*unusable_clients"
    with pytest.raises(DataError, match=message):
        make(**settings)
    with pytest.warns(
        UserWarning, match=r"clients left out, since they have no label or no usable example.*: 10 \(user_"
    ):
        data = make(**settings, unusable_clients="skip")
    assert len(data.federation.seen) == 30  # and none of these is drawn in place of those left out


def test_a_share_that_cannot_work(make):
    with pytest.raises(ConfigurationError, match="new_client_fraction is 1, expected a share"):
        make(train={"ann": numbers(1)}, new_client_fraction=1)
