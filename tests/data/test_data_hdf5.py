import errno
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

h5py = pytest.importorskip("h5py", reason="h5py is not installed")

from published_formats import cifar, emnist, posts, write_tff  # noqa: E402

from flow_pl.data import (  # noqa: E402
    Cifar100Data,
    EmnistData,
    HDF5Data,
    Images,
    NextWord,
    ShakespeareData,
    StackOverflowData,
    StackOverflowTagsData,
)
from flow_pl.errors import ConfigurationError, DataError  # noqa: E402

SETTINGS = {"val_fraction": 0, "new_client_fraction": 0}


def prepared(data):
    data.prepare_data()
    data.setup()
    return data


def names(data, clients):
    return [data.client_name(client) for client in clients]


@pytest.fixture
def words(tmp_path):
    """A training file of three users of Stack Overflow, and the settings to read it by."""
    users = {
        "u2": posts("the cat sat", "the cat ran", "a dog sat"),
        "u1": posts("the dog", "the the"),
        "u3": posts("cat cat cat cat cat", "sat"),
    }
    train = write_tff(tmp_path / "train.h5", users)
    return {"train": train, "encoding": NextWord(vocab_size=4), "cache_dir": str(tmp_path / "cache"), **SETTINGS}


def test_emnist(tmp_path):
    write_tff(tmp_path / "fed_emnist_train.h5", {"f1_02": emnist(0, 61, 5), "f0_01": emnist(3)})
    write_tff(tmp_path / "fed_emnist_test.h5", {"f0_01": emnist(9), "f1_02": emnist(7)})
    data = prepared(EmnistData(str(tmp_path), cache_dir=str(tmp_path / "cache"), **SETTINGS))
    assert names(data, range(2)) == ["f0_01", "f1_02"]
    rows = data.federation.store.read(1)
    assert rows.y.tolist() == [0, 61, 5, 7]
    assert rows.test_rows == 1
    assert (rows.x.dtype, rows.x.shape) == (np.uint8, (4, 1, 28, 28))
    np.testing.assert_array_equal(data.transform(torch.from_numpy(np.array(rows.x)))[:3, 0], emnist(0, 61, 5)["pixels"])
    assert data.num_classes == 62
    assert data.feature_shape == (1, 28, 28)
    assert data.federation.test_sizes.tolist() == [1, 1]


def test_the_digits_of_emnist_are_files_of_their_own(tmp_path):
    for part in ("train", "test"):
        write_tff(tmp_path / f"fed_emnist_digitsonly_{part}.h5", {"f": emnist(3, 4)})
    data = prepared(EmnistData(str(tmp_path), only_digits=True, cache_dir=str(tmp_path / "cache"), **SETTINGS))
    assert data.num_classes == 10


@pytest.mark.parametrize(("coarse", "labels", "classes"), [(False, [7, 99], 100), (True, [1, 19], 20)])
def test_the_test_clients_of_cifar_are_others_of_the_same_names(tmp_path, coarse, labels, classes):
    write_tff(tmp_path / "fed_cifar100_train.h5", {"0": cifar(7, 99), "1": cifar(1, 2)})
    write_tff(tmp_path / "fed_cifar100_test.h5", {"0": cifar(3, 4)})
    data = prepared(Cifar100Data(str(tmp_path), coarse, cache_dir=str(tmp_path / "cache"), **SETTINGS))
    assert names(data, data.federation.seen) == ["0", "1"]
    assert names(data, data.federation.new) == ["test/0"]
    assert data.federation.store.read(0).y.tolist() == labels
    assert (data.num_classes, data.feature_shape) == (classes, (3, 32, 32))


def test_shakespeare(tmp_path):
    write_tff(tmp_path / "shakespeare_train.h5", {"ALL_LAFEU": {"snippets": ["Ay, sir.\n" * 10, "No."]}})
    write_tff(tmp_path / "shakespeare_test.h5", {"ALL_LAFEU": {"snippets": ["Well"]}})
    data = prepared(ShakespeareData(str(tmp_path), cache_dir=str(tmp_path / "cache"), **SETTINGS))
    rows = data.federation.store.read(0)
    assert rows.x.shape == rows.y.shape == (4, 80)
    assert (rows.val_rows, rows.test_rows, data.num_classes) == (-1, 1, 90)
    np.testing.assert_array_equal(rows.x[0, 1:], rows.y[0, :-1])


def test_stack_overflow_has_three_populations(tmp_path):
    """A user of the test file alone came later, one of the held-out file is never trained on: both are new."""
    write_tff(tmp_path / "stackoverflow_train.h5", {"10": posts("a b c", "a b"), "7": posts("a a")})
    write_tff(tmp_path / "stackoverflow_test.h5", {"10": posts("c a"), "8": posts("b b", "b a", "b")})
    write_tff(tmp_path / "stackoverflow_held_out.h5", {"20": posts("only_here c", "a", "a", "c")})
    data = prepared(
        StackOverflowData(str(tmp_path), cache_dir=str(tmp_path / "cache"), val_fraction=0, test_fraction=0.25)
    )
    federation = data.federation
    assert names(data, federation.seen) == ["10", "7"]
    assert sorted(names(data, federation.new)) == ["20", "8"]
    assert [federation.split(client).test.tolist() for client in (0, 1)] == [[2], []]
    for client in federation.new:  # cut into rows to personalize and to evaluate on
        assert (federation.train_sizes[client], federation.test_sizes[client]) in ((2, 1), (3, 1))
    assert data.vocabularies["words"].tokens == ("a", "b", "c")
    assert data.test_populations == ("seen", "new")


def test_the_tags_of_stack_overflow(tmp_path):
    for part in ("train", "test", "held_out"):
        write_tff(tmp_path / f"stackoverflow_{part}.h5", {part: posts("a b", "b", tags="c|java", title="b")})
    data = StackOverflowTagsData(str(tmp_path), vocab_size=5, num_tags=4, cache_dir=str(tmp_path / "c"), **SETTINGS)
    prepared(data)
    rows = data.federation.store.read(0)
    assert rows.y.tolist() == [[1, 1, 0, 0]] * 2
    assert (data.num_classes, data.feature_shape) == (4, (5,))
    assert data.transform(torch.from_numpy(np.array(rows.x))).tolist()[1] == [
        1,
        0,
        0,
        0,
        0,
    ]  # "b" in the text and in the title
    batch = next(iter(data.test_dataloader()[0]))
    assert data.on_after_batch_transfer(batch, 0).train.x.shape[2:] == (5,)


def test_published_lists_of_words_are_used_as_they_are(tmp_path, words):
    (tmp_path / "word_count").write_text("sat 9\ndog 8\ncat 7\nfox 6\nthe 5\n")
    encoding = NextWord(vocab_size=4, vocabulary=str(tmp_path / "word_count"))
    data = prepared(HDF5Data(**words | {"encoding": encoding}))
    assert data.vocabularies["words"].tokens == ("sat", "dog", "cat", "fox")
    (tmp_path / "word_count").write_text("dog\nsat\n")
    again = prepared(HDF5Data(**words | {"encoding": encoding}))
    assert again.vocabularies["words"].tokens == ("dog", "sat")
    assert again.federation.store.path != data.federation.store.path


def test_the_vocabulary_is_counted_once_and_in_the_training_part_alone(tmp_path, words, monkeypatch):
    heldout = write_tff(tmp_path / "heldout.h5", {"u9": posts("dog fox fox fox fox fox fox fox fox")})
    data = prepared(HDF5Data(**words, heldout=heldout))
    assert data.vocabularies["words"].tokens == ("cat", "the", "sat", "dog")  # 7, 5, 3 and 2 times
    monkeypatch.setattr(HDF5Data, "_counted_clients", lambda self: pytest.fail("counted again"))
    again = HDF5Data(**words, heldout=heldout)
    for file in sorted(data.federation.store.path.iterdir()):  # as after a build that was killed while writing
        file.unlink()
    data.federation.store.path.rmdir()
    prepared(again)
    assert again.vocabularies["words"].tokens == data.vocabularies["words"].tokens


def test_a_changed_option_never_reads_a_stale_store(words):
    stores = {prepared(HDF5Data(**words | change)).federation.store.path for change in (
        {},
        {"encoding": NextWord(vocab_size=3)},
        {"encoding": NextWord(vocab_size=4, length=3)},
        {"max_examples": 1},
        {"client_fraction": 0.9},
        {"client_fraction": 0.9, "split_seed": 1},
        {"unusable_clients": "skip"},
    )}  # fmt: skip
    assert len(stores) == 7
    assert prepared(HDF5Data(**words | {"split_seed": 1})).federation.store.path in stores
    os.utime(words["train"], (1, 1))
    assert prepared(HDF5Data(**words)).federation.store.path not in stores


def test_examples_of_a_client_are_capped(words):
    data = prepared(HDF5Data(**words, max_examples=1))
    assert data.federation.store.sizes.tolist() == [1, 1, 1]


def test_a_share_of_the_clients_is_drawn_by_their_names(tmp_path):
    def drawn(clients, **settings):
        train = write_tff(tmp_path / "train.h5", {str(client): emnist(1) for client in clients})
        settings = {"encoding": Images("pixels", "label"), "cache_dir": str(tmp_path / "c"), **SETTINGS, **settings}
        data = prepared(HDF5Data(train, **settings))
        return names(data, range(len(data.federation.store)))

    first = drawn(range(200), client_fraction=0.3)
    assert 40 <= len(first) <= 80
    assert drawn(range(199, 99, -1), client_fraction=0.3) == [name for name in first if int(name) > 99]
    assert drawn(range(200), client_fraction=0.3, split_seed=1) != first


def test_clients_for_validation(tmp_path, words):
    validation = write_tff(tmp_path / "validation.h5", {"v": posts("the cat", "the", "sat", "cat sat")})
    data = prepared(HDF5Data(**words | {"val_fraction": 0.5}, validation=validation))
    assert names(data, data.federation.validation) == ["v"]
    assert [batch.client.tolist() for batch in data.val_dataloader()] == [data.federation.validation.tolist()]
    assert data.population(3) == "validation"


def test_a_client_with_test_examples_alone_is_new(tmp_path, words):
    test = write_tff(tmp_path / "test.h5", {"u1": posts("cat"), "late": posts("the cat", "sat")})
    data = prepared(HDF5Data(**words, test=test))
    assert names(data, data.federation.seen) == ["u1", "u2", "u3"]
    assert names(data, data.federation.new) == ["late"]
    assert data.federation.test_sizes.tolist() == [1, 0, 0, 1]


def test_an_unusable_client_stops_the_build_or_is_left_out(tmp_path, words):
    users = {"ann": posts("the cat"), "bob": posts("", " "), "carl": posts("the cat")}
    words["train"] = write_tff(tmp_path / "train.h5", users)
    with pytest.raises(DataError, match=r"train.h5: client 'bob' has no usable text: .*set unusable_clients to skip"):
        prepared(HDF5Data(**words))
    with pytest.warns(
        UserWarning, match=r"clients left out, since they have no label or no usable example.*: 1 \(bob\)"
    ):
        data = prepared(HDF5Data(**words, unusable_clients="skip"))
    assert names(data, range(2)) == ["ann", "carl"]


def test_a_client_of_unknown_words_alone(tmp_path, words):
    test = write_tff(tmp_path / "heldout.h5", {"zoe": posts("fox owl")})
    with pytest.raises(DataError, match=r"heldout.h5: client 'zoe' has only tokens that are not in the vocabulary"):
        prepared(HDF5Data(**words, heldout=test))


def test_an_empty_vocabulary(tmp_path, words):
    words["train"] = write_tff(tmp_path / "train.h5", {"ann": posts("", "")})
    with pytest.raises(DataError, match=r"train.h5: the vocabulary is empty: the training clients have no text"):
        prepared(HDF5Data(**words))
    assert list((tmp_path / "cache").glob("**/*")) == []


def test_a_list_with_a_word_twice(tmp_path, words):
    (tmp_path / "word_count").write_text("dog\nsat\ndog\n")
    encoding = NextWord(vocabulary=str(tmp_path / "word_count"))
    with pytest.raises(DataError, match=r"word_count: the vocabulary has the token 'dog' more than once"):
        prepared(HDF5Data(**words | {"encoding": encoding}))


def test_a_full_disk_for_the_vocabulary(words, tmp_path, monkeypatch):
    def full(self, text, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)
        with pytest.raises(ConfigurationError, match=r"vocabulary.json cannot be written \(.*No space.*set cache_dir"):
            prepared(HDF5Data(**words))
    assert list((tmp_path / "cache").iterdir()) == []
    prepared(HDF5Data(**words))


def test_a_damaged_vocabulary(words, tmp_path):
    prepared(HDF5Data(**words))
    (path,) = (tmp_path / "cache").glob("*.vocabulary.json")
    path.write_text('{"words": [')
    with pytest.raises(DataError, match=r"vocabulary.json is no usable vocabulary .*: delete it, it will be rebuilt"):
        _ = HDF5Data(**words).vocabularies


@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
def test_a_truncated_file(tmp_path, words, share):
    os.truncate(words["train"], int(os.path.getsize(words["train"]) * share))
    with pytest.raises(DataError, match=r"train.h5 is not a usable HDF5 file of clients .*: .*get it again"):
        prepared(HDF5Data(**words))
    assert list((tmp_path / "cache").glob("**/*")) == []


def test_a_file_whose_data_is_damaged(tmp_path, words):
    with h5py.File(words["train"], "w") as file:
        group = file.create_group("examples/ann")
        group.create_dataset("tokens", data=["a b c"] * 50, dtype=h5py.string_dtype())
        file.create_group("examples/bob").create_dataset(
            "tokens", data=np.arange(4000) % 7, chunks=(4000,), compression="gzip", fletcher32=True
        )
        offset = file["examples/bob/tokens"].id.get_chunk_info(0).byte_offset
    with open(words["train"], "r+b") as file:
        file.seek(offset + 8)
        file.write(b"\xff" * 8)
    with pytest.raises(DataError, match=r"train.h5: client 'bob' cannot be read \(.*\): get the file again"):
        prepared(HDF5Data(**words))


def test_files_that_hold_something_else(tmp_path, words):
    with h5py.File(words["train"], "w") as file:
        file.create_group("clients")
    with pytest.raises(DataError, match=r"it needs the group 'examples' with a group for each client"):
        prepared(HDF5Data(**words))
    write_tff(words["train"], {"ann": emnist(3)})
    with pytest.raises(DataError, match=r"train.h5: client 'ann' has no tokens, only label, pixels: name the right"):
        prepared(HDF5Data(**words))
    write_tff(words["train"], {"ann": emnist(3) | {"label": [1, 2]}})
    settings = words | {"encoding": Images("pixels", "label")}
    with pytest.raises(DataError, match=r"'ann' has columns of different lengths, {'pixels': 1, 'label': 2}"):
        prepared(HDF5Data(**settings))
    write_tff(words["train"], {"ann": emnist(3), "bob": emnist(63)})
    settings = words | {"encoding": Images("pixels", "label", num_classes=62)}
    with pytest.raises(DataError, match=r"train.h5: client 'bob' has the label 63 in row 0: expected 0 to 61"):
        prepared(HDF5Data(**settings))


def test_a_client_in_two_parts_that_should_be_disjoint(tmp_path, words):
    heldout = write_tff(tmp_path / "heldout.h5", {"u1": posts("the cat")})
    with pytest.raises(DataError, match=r"heldout.h5: client 'u1' comes twice"):
        prepared(HDF5Data(**words, heldout=heldout))


def test_a_file_that_is_not_there(words):
    with pytest.raises(DataError, match=r"there is no file .*nowhere.h5: correct the path"):
        prepared(HDF5Data(**words | {"train": "/nowhere.h5"}))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_examples": 0}, "max_examples is 0"),
        ({"client_fraction": 0}, "client_fraction is 0, expected a share greater than 0 and at most 1"),
        ({"client_fraction": 1.1}, r"client_fraction is 1.1"),
    ],
)
def test_settings_that_cannot_work(words, settings, message):
    with pytest.raises(ConfigurationError, match=message):
        HDF5Data(**words | settings)


def test_without_h5py(monkeypatch, words):
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(ConfigurationError, match=r'this data needs h5py .*: pip install "h5py>='):
        prepared(HDF5Data(**words))
