import json
from collections import Counter

import numpy as np
import pytest

from flow_pl.data import BOS, EOS, OOV, PAD, Vocabulary
from flow_pl.data.encodings.vocabulary import SPECIAL, most_frequent, read_tokens
from flow_pl.errors import DataError


def test_tokens_follow_the_special_numbers():
    vocabulary = Vocabulary(["the", "a"])
    assert [PAD, OOV, BOS, EOS, SPECIAL] == [0, 1, 2, 3, 4]
    assert vocabulary.encode(["a", "cat", "the"]) == [5, OOV, 4]
    assert len(vocabulary) == 6


def test_rows_are_filled_up():
    rows = Vocabulary("ab").rows([[4, 5], [], [5]], 3)
    np.testing.assert_array_equal(rows, [[4, 5, PAD], [PAD, PAD, PAD], [5, PAD, PAD]])
    assert rows.dtype == np.int16


def test_a_large_vocabulary_has_larger_numbers():
    assert Vocabulary(map(str, range(32_763))).dtype == np.int16
    assert Vocabulary(map(str, range(32_764))).dtype == np.int32


def test_the_most_frequent_tokens_whatever_the_order_of_counting():
    """Equally frequent ones in alphabetical order."""
    words = ["b", "c", "a", "c", "d"]
    expected = ["c", "a", "b"]
    assert most_frequent(Counter(words), 3) == expected == most_frequent(Counter(reversed(words)), 3)
    assert most_frequent(Counter(words), 9) == ["c", "a", "b", "d"]


def test_published_lists_of_tokens(tmp_path):
    lines, counts = tmp_path / "stackoverflow.word_count", tmp_path / "stackoverflow.tag_count"
    lines.write_text("the 341000\n. 340000\n\ni 339000\n")
    counts.write_text(json.dumps({"c#": 5, "java": 9, "c": 5}))
    assert read_tokens(lines, 2) == ["the", "."]
    assert read_tokens(lines, 9) == ["the", ".", "i"]
    assert read_tokens(counts, 2) == ["java", "c"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "lists no token"),
        ("\n \n", "lists no token"),
        ("{}", "lists no token"),
        ('{"a": ', "is not a list of tokens"),
    ],
)
def test_lists_without_tokens(tmp_path, text, message):
    (tmp_path / "list").write_text(text)
    with pytest.raises(DataError, match=f"list {message}"):
        read_tokens(tmp_path / "list", 5)


def test_a_list_that_is_not_there(tmp_path):
    with pytest.raises(DataError, match=r"list is not a list of tokens .*No such file"):
        read_tokens(tmp_path / "list", 5)


def test_vocabularies_that_cannot_work():
    with pytest.raises(DataError, match="the vocabulary is empty: the training clients have no text"):
        Vocabulary([])
    with pytest.raises(DataError, match="has the token 'a' more than once"):
        Vocabulary(["a", "b", "a"])
