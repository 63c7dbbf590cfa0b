"""Sentences get the label of their post's kind and their place in it."""

import gzip
import json

import numpy as np
import pytest

from tools.discourse import sentences, write


def user(posts, kinds):
    """A user whose i-th post has posts[i] sentences of kind kinds[i]; sentence j of post i is "i j"."""
    rows = [(f"{i} {j}", i, kinds[i]) for i, length in enumerate(posts) for j in range(length)]
    return dict(zip(("x", "post", "kind"), map(list, zip(*rows, strict=True)), strict=True))


def test_first_and_last_sentence_of_a_users_first_posts():
    one = user([2, 1, 4, 3], "qaaq")
    assert sentences(one, 2) == [("0 0", 0), ("0 1", 1), ("2 0", 2), ("2 3", 3)]
    assert sentences(one, 4) == []  # it has three posts of two sentences or more


def test_the_file_has_a_row_for_each_sentence(tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"0123456789"]))
    transformers.BertTokenizerFast(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path)
    users = {"b": user([2, 2], "qa"), "a": user([3, 2], "aq"), "c": user([1], "a")}
    with gzip.open(tmp_path / "posts.json.gz", "wt") as file:
        json.dump({"user_data": users}, file)
    write(tmp_path / "posts.json.gz", tmp_path / "data.npz", str(tmp_path), users=5, posts=2, length=6)
    made = np.load(tmp_path / "data.npz")
    assert made["client"].tolist() == [0] * 4 + [1] * 4
    assert made["y"].tolist() == [2, 3, 0, 1, 0, 1, 2, 3]
    assert made["x"][1].tolist() == [2, 5, 7, 3, 0, 0]  # [CLS] 0 2 [SEP], the last sentence of a's first post
