"""Texts that a tokenizer turns into token ids and their mask, from LEAF's files and from tables."""

import json
import shutil

import numpy as np
import pytest
from published_formats import write_leaf

from flow_pl.data import ArrayData, LeafData, PartitionedData, TokenizedTexts, Vectors
from flow_pl.data.encodings.tokenized import load_tokenizer
from flow_pl.errors import ConfigurationError, DataError
from flow_pl.report.names import kind_of, token_names
from flow_pl.tasks import Classification

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "how", "do", "i", "sort", "a", "list", "you", "call", "it"]
SENTENCES = {
    "ann": {"x": ["how do i sort a list", "call it", "you do"], "kind": "qaa", "topic": [0, 1, 2]},
    "bob": {"x": ["call a friend", "how", "do you"], "kind": "aqq", "topic": [2, 2, -1]},
}
SETTINGS = {"val_fraction": 0.0, "new_client_fraction": 0.0, "cohort_size": 2}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """The folder of a small tokenizer of BERT's kind."""
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    transformers.BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    return str(folder)


def prepared(data):
    data.prepare_data()
    data.setup()
    return data


def leaf(tmp_path, encoding, sentences=SENTENCES, **settings):
    train = write_leaf(tmp_path / "sentences.json", sentences)
    return prepared(LeafData(train, encoding, cache_dir=str(tmp_path / "cache"), **{**SETTINGS, **settings}))


def words(row):
    return [WORDS[number] for number in row]


def test_sentences_of_leaf_with_a_field_as_label(tmp_path, tokenizer):
    data = leaf(tmp_path, TokenizedTexts(tokenizer, label="kind", length=6, classes=["q", "a"]))
    rows = data.federation.store.read(1)
    assert words(rows.x["input_ids"][0]) == ["[CLS]", "call", "a", "[UNK]", "[SEP]", "[PAD]"]
    assert rows.x["attention_mask"].tolist() == [[1, 1, 1, 1, 1, 0], [1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 0, 0]]
    assert rows.y.tolist() == [1, 0, 0]
    # a longer text is cut
    assert words(data.federation.store.read(0).x["input_ids"][0]) == ["[CLS]", "how", "do", "i", "sort", "[SEP]"]
    assert data.class_names == ("q", "a")
    assert data.example()["input_ids"].dtype == data.example()["attention_mask"].dtype


def test_a_label_may_be_a_number_or_missing(tmp_path, tokenizer):
    data = leaf(tmp_path, TokenizedTexts(tokenizer, label="topic", length=6, num_classes=5))
    rows = data.federation.store.read(1)
    assert (rows.y.tolist(), rows.labelled, data.num_classes) == ([2, 2, -1], 2, 5)


def test_pairs_have_segments(tmp_path, tokenizer):
    pairs = {"ann": {"x": ["how do i", "call"], "reply": ["you do", "it"], "y": [0, 1]}}
    data = leaf(tmp_path, TokenizedTexts(tokenizer, length=9, second="reply"), pairs, cohort_size=1)
    x = data.federation.store.read(0).x
    assert words(x["input_ids"][0]) == ["[CLS]", "how", "do", "i", "[SEP]", "you", "do", "[SEP]", "[PAD]"]
    assert x["token_type_ids"].tolist()[0] == [0, 0, 0, 0, 0, 1, 1, 1, 0]


@pytest.mark.parametrize("ending", ["csv", "parquet", "jsonl"])
def test_sentences_of_tables(tmp_path, tokenizer, ending):
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    pytest.importorskip("flwr_datasets", reason="flwr-datasets is not installed")
    users = {"user": [u for u, data in SENTENCES.items() for _ in data["x"]]}
    columns = {key: [value for data in SENTENCES.values() for value in data[key]] for key in ("x", "kind")}
    table, file = datasets.Dataset.from_dict({**users, **columns}), str(tmp_path / f"table.{ending}")
    {"csv": table.to_csv, "parquet": table.to_parquet, "jsonl": table.to_json}[ending](file)
    encoding = TokenizedTexts(tokenizer, label="kind", length=6, classes=["q", "a"])
    by_user = {"class_path": "NaturalIdPartitioner", "init_args": {"partition_by": "user"}}
    data = prepared(PartitionedData(file, by_user, encoding, cache_dir=str(tmp_path / "cache"), **SETTINGS))
    store, same = data.federation.store, leaf(tmp_path, encoding).federation.store
    for client in range(2):
        for name, values in same.read(client).x.items():
            assert store.read(client).x[name].tolist() == values.tolist()


def test_features_by_name_of_a_table_with_tokens(tmp_path):
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    pytest.importorskip("flwr_datasets", reason="flwr-datasets is not installed")
    rows = {"ids": [[3, 1, 0], [2, 0, 0]] * 4, "age": [1.5, 2.0] * 4, "pay": [1, 2] * 4, "y": [0, 1] * 4}
    datasets.Dataset.from_dict(rows).to_parquet(str(tmp_path / "table.parquet"))
    encoding = Vectors({"input_ids": "ids", "person": ["age", "pay"]})
    by_size = {"class_path": "IidPartitioner", "init_args": {"num_partitions": 2}}
    path = str(tmp_path / "table.parquet")
    data = prepared(PartitionedData(path, by_size, encoding, cache_dir=str(tmp_path / "cache"), **SETTINGS))
    x = data.federation.store.read(0).x
    assert x["input_ids"].dtype.kind == "i"
    assert x["person"].tolist() == [[a, p] for a, p in zip(rows["age"][:4], rows["pay"][:4], strict=True)]


def test_another_tokenizer_in_the_same_folder_is_another_store(tmp_path, tokenizer):
    folder = shutil.copytree(tokenizer, tmp_path / "mine")
    encoding = TokenizedTexts(str(folder), length=6)
    before = encoding.options()
    assert json.dumps(before)
    (folder / "tokenizer.json").write_text((folder / "tokenizer.json").read_text() + "\n")
    assert encoding.options() != before
    (folder / "model.safetensors").write_bytes(b"weights are not the tokenizer's")
    assert len(encoding.options()["files"]) == len(before["files"])


def test_reports_show_the_tokens(tmp_path, tokenizer):
    data = leaf(tmp_path, TokenizedTexts(tokenizer, label="topic", length=6))
    assert kind_of(data, Classification()) == "text"
    assert token_names(data)[4:6] == ["how", "do"]


def without_padding(folder):
    library = pytest.importorskip("tokenizers")
    words = library.Tokenizer(library.models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    transformers.PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)
    return str(folder)


def test_bad_tokenizers_and_texts_are_refused(tmp_path, tokenizer):
    with pytest.raises(ConfigurationError, match=r"tokenizer is .*/none, which cannot be loaded .*: give a folder"):
        load_tokenizer(str(tmp_path / "none"))
    with pytest.raises(ConfigurationError, match=r"has no padding token for short texts"):
        load_tokenizer(without_padding(tmp_path / "own"))
    with pytest.raises(DataError, match=r"client 'ann' has no y, only x, kind"):
        leaf(tmp_path, TokenizedTexts(tokenizer))
    with pytest.raises(DataError, match=r"client 'ann' has the label 'q' in 'kind': set classes"):
        leaf(tmp_path, TokenizedTexts(tokenizer, label="kind"))
    with pytest.raises(DataError, match=r"client 'ann' has a int in row 0 of 'topic', expected a text"):
        leaf(tmp_path, TokenizedTexts(tokenizer, text="topic", label="topic"))
    with pytest.raises(ConfigurationError, match=r"length is 0, expected a whole number of 1 or more"):
        TokenizedTexts(tokenizer, length=0)


def test_arrays_of_tokens_need_no_tokenizer(tmp_path):
    ids = np.array([[4, 5, 0], [6, 0, 0]] * 4)
    np.savez(tmp_path / "a.npz", ids=ids, mask=ids > 0, y=[0, 1] * 4, client=[0] * 4 + [1] * 4)
    columns = {"input_ids": "ids", "attention_mask": "mask"}
    cache = str(tmp_path / "cache")
    data = prepared(ArrayData(str(tmp_path / "a.npz"), feature_columns=columns, cache_dir=cache, **SETTINGS))
    assert data.example()["input_ids"].dtype.is_signed
