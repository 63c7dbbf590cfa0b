import numpy as np
import pytest
import torch
from published_formats import cifar, emnist, reddit

from flow_pl.data import (
    CharacterAfterWindow,
    Images,
    NextCharacter,
    NextWord,
    TagPrediction,
    TokenSequences,
    Vectors,
    Vocabulary,
)
from flow_pl.data.encodings.text import CHARACTERS
from flow_pl.data.store.client_checks import UnusableError
from flow_pl.errors import ConfigurationError, DataError

WORDS = {"words": Vocabulary(["the", "cat", "sat"]), "tags": Vocabulary(["python", "c"])}
EVERYTHING = {
    "words": Vocabulary(["dog", "bird"]),
    "tags": Vocabulary(["c"]),
    "characters": Vocabulary("xyz"),
}
LETTERS = {"characters": Vocabulary("abcdefg")}


def test_pixels_are_stored_as_bytes_without_a_loss():
    x, y = Images("pixels", "label").encode(emnist(3, 61), {})
    assert (x.shape, x.dtype) == ((2, 1, 28, 28), np.uint8)
    np.testing.assert_array_equal(x[:, 0] / np.float32(255), emnist(3, 61)["pixels"])
    assert y.tolist() == [3, 61]


def test_channels_come_first():
    x, y = Images("image", "coarse_label", 32, 32, 3).encode(cifar(7, 9), {})
    assert x.shape == (2, 3, 32, 32)
    assert x[:, :, 5, 6].tolist() == [[7, 8, 9], [9, 10, 11]]
    assert y.tolist() == [1, 1]


def test_pictures_may_be_rows_of_numbers_and_labels_of_one_entry():
    """LEAF's FEMNIST holds 784 fractions a picture."""
    columns = {"x": emnist(5)["pixels"].reshape(1, 784).tolist(), "y": [[5.0]]}
    x, y = Images("x", "y").encode(columns, {})
    np.testing.assert_array_equal(x, Images("pixels", "label").encode(emnist(5), {}).x)
    assert (y.tolist(), y.dtype) == ([5], np.int64)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((2, 28, 27)), r"images of shape \(28, 27\), expected \(28, 28, 1\): set height, width, channels"),
        (np.full((2, 28, 28), 1.5), "pixels from 1.5 to 1.5, expected numbers from 0 to 1"),
        (np.full((2, 28, 28), np.nan), "pixels from nan to nan, expected numbers"),
        (np.full((2, 28, 28), 256), "pixels from 256 to 256, expected bytes"),
        ([[1, 2], [3]], "rows of different shapes in 'pixels'"),
        ([["a"], ["b"]], "values of type <U1 in 'pixels', expected numbers"),
    ],
)
def test_pictures_that_are_none(image, message):
    with pytest.raises(DataError, match=message):
        Images("pixels", "label").encode({"pixels": image, "label": [0, 1]}, {})


def test_vectors_are_single_precision():
    x, y = Vectors().encode({"x": [[0.5, 1.0]], "y": [2]}, {})
    assert (x.tolist(), x.dtype, y.tolist()) == ([[0.5, 1.0]], np.float32, [2])


def test_next_words():
    """By hand, as TensorFlow Federated's preprocessing: the end is a target of a sentence that is not cut."""
    encoding = NextWord(length=4)
    sentences = ["the cat", b"the dog sat .", "sat sat sat sat sat", ""]
    x, y = encoding.encode({"tokens": sentences}, WORDS)
    assert x.tolist() == [[2, 4, 5, 3], [2, 4, 1, 6], [2, 6, 6, 6]]
    assert y.tolist() == [[4, 5, 3, 0], [4, 1, 6, 1], [6, 6, 6, 6]]
    assert (x.dtype, y.dtype) == (np.int16, np.int16)
    assert encoding.class_count(WORDS) == 7
    counted = [(name, list(tokens)) for name, tokens in encoding.tokens({"tokens": sentences[:1]})]
    assert counted == [("words", ["the", "cat"])]


def test_next_characters():
    """By hand: beginning + text + end in pieces of 5, of which 4 are a row; a row of an end alone has no target."""
    x, y = NextCharacter("x", length=4).encode({"x": ["abcdefg", "ab", "abcd", ""]}, LETTERS)
    assert x.tolist() == [[2, 4, 5, 6], [8, 9, 10, 3], [2, 4, 5, 3], [2, 4, 5, 6]]
    assert y.tolist() == [[4, 5, 6, 7], [9, 10, 3, 0], [4, 5, 3, 0], [4, 5, 6, 7]]


def test_the_published_characters():
    encoding = NextCharacter()
    assert len(CHARACTERS) == len(set(CHARACTERS)) == 86
    assert encoding.class_count({"characters": Vocabulary(CHARACTERS)}) == 90
    assert encoding.vocabularies()["characters"].characters == CHARACTERS


def test_the_character_after_a_window_is_the_only_target():
    x, y = CharacterAfterWindow(length=3).encode({"x": ["abc", "bcd"], "y": ["d", "z"]}, LETTERS)
    assert x.tolist() == [[4, 5, 6], [5, 6, 7]]
    assert y.tolist() == [[0, 0, 7], [0, 0, 1]]
    with pytest.raises(DataError, match="has 2 characters followed by 1 in row 0, expected 3 followed by 1"):
        CharacterAfterWindow(length=3).encode({"x": ["ab"], "y": ["d"]}, LETTERS)


def test_sequences_of_tokens():
    """By hand: one comment of two sequences, and one whose second sequence has no target and is left out."""
    columns = reddit("the cat sat dog", "the cat", length=3)
    x, y = TokenSequences(length=3).encode(columns, WORDS)
    assert x.tolist() == [[2, 4, 5], [6, 1, 3], [2, 4, 5]]
    assert y.tolist() == [[4, 5, 6], [1, 3, 0], [4, 5, 3]]
    counted = [list(tokens) for _, tokens in TokenSequences(length=3).tokens(columns)]
    assert counted == [["the", "cat"], ["sat", "dog"], ["the", "cat"], []]


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        ([[["a"]]], [{"target_tokens": [["a"]]}], "a sequence of 1 tokens, expected 2: set length"),
        ([[["a", "b"]]], [{"target_tokens": []}], "1 sequences but 0 of targets in row 0"),
        ([[["a", "b"]]], [{}], "is not a list of sequences"),
        ([3], [{}], "is not a list of sequences"),
        (["ab"], [{}], "is not a list of sequences"),
    ],
)
def test_sequences_that_are_none(x, y, message):
    with pytest.raises(DataError, match=message):
        TokenSequences(length=2).encode({"x": x, "y": y}, WORDS)


def test_tags_are_zeros_and_ones_and_words_become_shares_on_the_device():
    encoding = TagPrediction(vocab_size=5, num_tags=3, length=6)
    columns = {"tokens": ["the the cat", "", "dog"], "title": ["sat", "", ""], "tags": ["c|java", "c", "python|c"]}
    x, y = encoding.encode(columns, WORDS)
    assert x.tolist() == [[4, 4, 5, 6, 0, 0], [1, 0, 0, 0, 0, 0]]  # a row without a word is left out
    assert y.tolist() == [[0, 1, 0], [1, 1, 0]]
    shares = encoding.unpack(torch.from_numpy(x).reshape(1, 2, 6))
    assert shares.dtype == torch.float32
    assert shares.tolist() == [[[0.5, 0.25, 0.25, 0, 0], [0, 0, 0, 0, 0]]]
    assert encoding.unpack(torch.zeros(1, 6, dtype=torch.int16)).tolist() == [[0.0] * 5]
    assert encoding.class_count(WORDS) == 3
    counted = [(name, list(tokens)) for name, tokens in encoding.tokens({k: v[:1] for k, v in columns.items()})]
    assert counted == [("words", ["the", "the", "cat"]), ("words", ["sat"]), ("tags", ["c", "java"])]


@pytest.mark.parametrize(
    ("encoding", "columns", "vocabularies"),
    [
        (NextWord(), {"tokens": ["", " "]}, WORDS),
        (NextCharacter("x"), {"x": ["", ""]}, LETTERS),
        (TokenSequences(), {"x": [[]], "y": [{"target_tokens": []}]}, WORDS),
        (TagPrediction(), {"tokens": [""], "title": [""], "tags": ["c"]}, WORDS),
    ],
)
def test_no_usable_text(encoding, columns, vocabularies):
    with pytest.raises(UnusableError, match="has no usable text"):
        encoding.encode(columns, vocabularies)


@pytest.mark.parametrize(
    ("encoding", "columns", "vocabularies"),
    [
        (NextWord(), {"tokens": ["dog dog", "bird"]}, WORDS),
        (NextCharacter("x"), {"x": ["xyz"]}, LETTERS),
        (TokenSequences(), reddit("dog bird"), WORDS),
        (TagPrediction(), {"tokens": ["dog"], "title": [""], "tags": ["c"]}, WORDS),
    ],
)
def test_unknown_tokens_alone(encoding, columns, vocabularies):
    rows = encoding.encode(columns, vocabularies)
    assert not encoding.can_be_learned_from(rows)
    assert encoding.can_be_learned_from(encoding.encode(columns, EVERYTHING))


def test_texts_that_are_none():
    with pytest.raises(DataError, match="has a int in row 1 of 'tokens', expected a text"):
        NextWord().encode({"tokens": ["a", 3]}, WORDS)


def test_options_tell_encodings_apart():
    options = [NextWord().options(), NextWord(length=10).options(), NextCharacter("tokens").options()]
    assert all(options.count(option) == 1 for option in options)


@pytest.mark.parametrize(
    "make",
    [
        lambda: NextWord(vocab_size=0),
        lambda: NextCharacter(length=0),
        lambda: TokenSequences(length=-1),
        lambda: TagPrediction(num_tags=0),
        lambda: Images(height=0),
    ],
)
def test_sizes_that_cannot_work(make):
    with pytest.raises(ConfigurationError, match="expected a whole number of 1 or more"):
        make()


def test_pictures_of_truth_values_have_two_levels():
    x = Images("x", "y", 2, 2).encode({"x": np.array([[[True, False], [False, True]]]), "y": [0]}, {}).x
    assert x.tolist() == [[[[255, 0], [0, 255]]]]


def test_channels_may_be_stored_first():
    picture = np.arange(24, dtype=np.uint8).reshape(1, 3, 4, 2)
    first = Images("x", "y", 4, 2, 3).encode({"x": picture, "y": [0]}, {}).x
    last = Images("x", "y", 4, 2, 3).encode({"x": np.moveaxis(picture, 1, -1), "y": [0]}, {}).x
    np.testing.assert_array_equal(first, picture)
    np.testing.assert_array_equal(last, picture)
    with pytest.raises(DataError, match=r"has images of shape \(3, 2, 4\), expected \(4, 2, 3\)"):
        Images("x", "y", 4, 2, 3).encode({"x": picture.swapaxes(2, 3), "y": [0]}, {})
    with pytest.raises(DataError, match=r"has images of shape \(2, 4\), expected \(4, 2, 1\)"):
        Images("x", "y", 4, 2).encode({"x": picture[0].reshape(3, 2, 4), "y": [0, 0, 0]}, {})


def test_several_columns_are_joined():
    columns = {"a": [1, 2], "b": [0.5, 3], "y": [0, 1]}
    x, y = Vectors(["a", "b"]).encode(columns, {})
    assert (x.tolist(), x.dtype, y.tolist()) == ([[1, 0.5], [2, 3]], np.float32, [0, 1])
    assert Vectors(["a", "b"]).columns == ("a", "b", "y")
    with pytest.raises(DataError, match=r"has \{'a': \(2,\), 'c': \(2, 1\)\}, which cannot be joined"):
        Vectors(["a", "c"]).encode(columns | {"c": [[1], [2]]}, {})


def test_texts_are_classes_where_these_are_named():
    columns = {"x": [[1.0], [2.0], [3.0]], "y": ["no", b"yes", ""]}
    encoding = Vectors(classes=["no", "yes"])
    assert encoding.encode(columns, {}).y.tolist() == [0, 1, -1]
    assert encoding.label_names() == ["no", "yes"]
    with pytest.raises(DataError, match=r"has the label 'no' in 'y': set classes in the encoding"):
        Vectors().encode(columns, {})
    with pytest.raises(DataError, match=r"has the label 'no' in 'y', expected one of yes, maybe"):
        Vectors(classes=["yes", "maybe"]).encode(columns, {})


def test_labels_may_be_real_values():
    x, y = Vectors(labels="values").encode({"x": [[1.0], [2.0], [3.0]], "y": [0.5, None, float("nan")]}, {})
    assert (x.shape, y.dtype) == ((3, 1), np.float32)
    np.testing.assert_array_equal(y, np.array([0.5, np.nan, np.nan], dtype=np.float32))
    assert Vectors(labels="values").class_count({}) == 1
    with pytest.raises(DataError, match=r"labels of shape \[2\] in 'y', expected one number"):
        Vectors(labels="values").encode({"x": [[1.0]], "y": [[1.0, 2.0]]}, {})
    with pytest.raises(ConfigurationError, match="labels is values, which have no classes"):
        Vectors(labels="values", num_classes=3)


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        ([[1.0], [1.0]], np.array([0, 1.5], np.float32), "has the label 1.5 in row 1 of 'y', expected whole numbers"),
        ([[1.0], [1e300]], [0, 1], r"has 1e\+300 in row 1 of 'x', larger than the largest float32, 3.4028235e\+38"),
        ([[1.0], [2.0]], [0, float("nan")], "has the label NaN in row 1 of 'y': expected 0 or more, -1 = to be"),
    ],
)
def test_numbers_that_are_no_features_or_labels(x, y, message):
    with pytest.raises(DataError, match=message):
        Vectors().encode({"x": x, "y": y}, {})
