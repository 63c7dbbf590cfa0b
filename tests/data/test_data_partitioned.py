import json
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

datasets = pytest.importorskip("datasets", reason="datasets is not installed")
pytest.importorskip("flwr_datasets", reason="flwr-datasets is not installed")

from flow_pl.data import Images, NextWord, PartitionedData, Vectors  # noqa: E402
from flow_pl.errors import ConfigurationError, DataError  # noqa: E402
from flow_pl.utils.parser import FlowParser  # noqa: E402

ROWS = 60
TABLE = {
    "x": [[row, row / 2] for row in range(ROWS)],
    "label": [row % 5 for row in range(ROWS)],
    "writer": [f"writer_{row // 20}" for row in range(ROWS)],
    "text": [f"word_{row % 3} and so on" for row in range(ROWS)],
}


@pytest.fixture(autouse=True)
def _quiet():
    datasets.disable_progress_bars()


def partitioner(name, **settings):
    return {"class_path": f"flwr_datasets.partitioner.{name}", "init_args": settings}


IID = partitioner("IidPartitioner", num_partitions=4)
NATURAL = partitioner("NaturalIdPartitioner", partition_by="writer")


@pytest.fixture
def make(tmp_path):
    def make(path=None, partitioner=IID, encoding=None, **settings):
        if path is None:
            path = tmp_path / "table.parquet"
            if not path.exists():  # a file that is written anew is another one
                datasets.Dataset.from_dict(TABLE).to_parquet(path)
        settings = {"cache_dir": str(tmp_path / "cache"), "val_fraction": 0, "new_client_fraction": 0, **settings}
        data = PartitionedData(str(path), partitioner, encoding or Vectors(label="label"), **settings)
        data.prepare_data()
        data.setup()
        return data

    return make


def rows(data):
    """The rows of each client by their first feature, which is their number."""
    store = data.federation.store
    return {store.name(client): store.read(client).x[:, 0].astype(int).tolist() for client in range(len(store))}


@pytest.mark.parametrize(
    "partitioner",
    [
        IID,
        partitioner("DirichletPartitioner", num_partitions=4, partition_by="label", alpha=0.5, min_partition_size=1),
        partitioner("PathologicalPartitioner", num_partitions=5, partition_by="label", num_classes_per_partition=2),
        partitioner("ShardPartitioner", num_partitions=4, partition_by="label", num_shards_per_partition=2),
        partitioner("LinearPartitioner", num_partitions=4),
        partitioner("SizePartitioner", partition_sizes=[10, 20, 30]),
        NATURAL,
    ],
)
def test_every_row_belongs_to_the_client_that_the_partitioner_says(make, partitioner):
    found = rows(make(partitioner=partitioner))
    module, name = partitioner["class_path"].rsplit(".", 1)
    expected = getattr(sys.modules[module], name)(**partitioner["init_args"])
    expected.dataset = datasets.Dataset.from_dict(TABLE)
    assert list(found.values()) == [
        [row[0] for row in expected.load_partition(index)["x"]] for index in range(expected.num_partitions)
    ]


def test_a_division_without_a_column_is_by_the_labels_of_the_encoding(make):
    settings = {"num_partitions": 4, "alpha": 0.5, "min_partition_size": 1, "seed": 0}
    named, unnamed = (partitioner("DirichletPartitioner", partition_by=by, **settings) for by in ("label", None))
    assert rows(make(partitioner=unnamed)) == rows(make(partitioner=named))


def test_a_table_with_real_labels_is_one_for_regression(make, tmp_path):
    """Row by row; a null is to be predicted."""
    path = tmp_path / "values.parquet"
    values = [None if row == 7 else row / 8 for row in range(ROWS)]
    datasets.Dataset.from_dict({"x": TABLE["x"], "value": values}).to_parquet(path)
    data = make(path=path, encoding=Vectors(label="value", labels="values"))
    store = data.federation.store
    assert store.real_valued
    read = [store.read(client) for client in range(len(store))]
    found = {int(x[0]): y for each in read for x, y in zip(each.x, each.y, strict=True)}
    assert np.isnan(found.pop(7))
    assert found == {row: row / 8 for row in range(ROWS) if row != 7}


def test_natural_clients_keep_their_names(make):
    assert list(rows(make(partitioner=NATURAL))) == ["writer_0", "writer_1", "writer_2"]
    assert list(rows(make()))[:2] == ["partition_00000", "partition_00001"]


def test_partition_indices_are_computed_once(make, monkeypatch):
    from flwr_datasets.partitioner import NaturalIdPartitioner

    calls = []
    compute = NaturalIdPartitioner._create_partition_id_to_indices
    monkeypatch.setattr(
        NaturalIdPartitioner, "_create_partition_id_to_indices", lambda self: (calls.append(1), compute(self))
    )
    data = make(partitioner=NATURAL, encoding=NextWord("text"))  # goes through the clients twice
    assert len(data.federation.store) == 3
    assert calls == [1]


@pytest.mark.parametrize("kind", ["csv", "json", "jsonl", "parquet", "arrow", "disk", "splits", "folder"])
def test_local_files_of_every_kind(make, tmp_path, kind):
    table = datasets.Dataset.from_dict(TABLE)
    path = tmp_path / f"data.{kind}"
    if kind == "csv":
        table.to_csv(path)
    elif kind == "json":
        path.write_text(json.dumps([dict(zip(TABLE, row, strict=True)) for row in zip(*TABLE.values(), strict=True)]))
    elif kind == "jsonl":
        table.to_json(path)
    elif kind == "parquet":
        table.to_parquet(path)
    elif kind == "arrow":
        table.save_to_disk(tmp_path / "saved")
        path = next((tmp_path / "saved").glob("*.arrow"))
    elif kind == "disk":
        table.save_to_disk(path)
    elif kind == "splits":
        datasets.DatasetDict({"train": table.select(range(5)), "all": table}).save_to_disk(path)
    else:
        for half in (0, 1):
            (path / "deeper").mkdir(parents=True, exist_ok=True)
            table.shard(2, half).to_parquet(path / "deeper" / f"{half}.parquet")
    split = "all" if kind == "splits" else "train"
    if kind == "csv":  # has no lists
        data = make(path, NATURAL, NextWord("text"), split=split)
        assert data.federation.store.sizes.tolist() == [20, 20, 20]
    else:
        assert rows(make(path, NATURAL, split=split))["writer_1"] == list(range(20, 40))


def test_pictures_are_decoded(make, tmp_path):
    image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
    pictures = [np.full((4, 6, 3), row, dtype=np.uint8) for row in range(6)]
    table = {"image": [image.fromarray(picture) for picture in pictures], "label": list(range(6))}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(num_classes=6)})
    datasets.Dataset.from_dict(table, features=features).to_parquet(tmp_path / "pictures.parquet")
    encoding = Images(height=4, width=6, channels=3)
    data = make(tmp_path / "pictures.parquet", partitioner("IidPartitioner", num_partitions=2), encoding)
    x = data.federation.store.read(1).x
    assert (x.shape, x.dtype) == ((3, 3, 4, 6), np.uint8)
    assert x[:, 0, 0, 0].tolist() == [3, 4, 5]


def test_texts_and_nested_lists(make, tmp_path):
    pictures = np.arange(8 * 12, dtype=np.uint8).reshape(8, 2, 2, 3)
    table = datasets.Dataset.from_dict({"image": list(pictures), "label": list(range(8))})
    table.to_parquet(tmp_path / "nested.parquet")
    data = make(tmp_path / "nested.parquet", IID, Images(height=2, width=2, channels=3))
    np.testing.assert_array_equal(data.federation.store.read(1).x, pictures[2:4].transpose(0, 3, 1, 2))
    assert data.transform(torch.from_numpy(pictures)).max() < 1
    words = make(encoding=NextWord("text", vocab_size=3))
    assert words.vocabularies["words"].tokens == ("and", "on", "so")


def test_a_changed_partitioner_has_another_store(make):
    stores = {
        make(partitioner=partitioner("IidPartitioner", num_partitions=clients)).federation.store.path
        for clients in (3, 4)
    }
    assert len(stores) == 2


def test_a_client_that_the_partitioner_leaves_empty(make):
    dirichlet = partitioner(
        "DirichletPartitioner", num_partitions=30, partition_by="label", alpha=0.01, min_partition_size=0
    )
    with pytest.raises(DataError, match=r"table.parquet: client 'partition_\d+' has no examples: .*unusable_clients"):
        make(partitioner=dirichlet)
    assert 1 < len(make(partitioner=dirichlet, unusable_clients="skip").federation.store) < 30


@pytest.mark.parametrize(
    ("partitioner", "error", "message"),
    [
        ({"init_args": {}}, ConfigurationError, "expected a class_path and its init_args"),
        (Fraction(1), ConfigurationError, "partitioner is of type Fraction, expected its name and arguments"),
        ({"class_path": "X", "init_args": 3}, ConfigurationError, "expected a class_path and its init_args"),
        ({**partitioner("IidPartitioner"), "init_arg": {}}, ConfigurationError, "cannot be created: .*init_arg"),
        (partitioner("NoPartitioner"), ConfigurationError, "cannot be created: .*NoPartitioner"),
        (partitioner("IidPartitioner", number=3), ConfigurationError, "cannot be created: .*number"),
        (partitioner("IidPartitioner", num_partitions=0), ConfigurationError, "cannot be created: .*greater than zero"),
        ({"class_path": "collections.Counter"}, ConfigurationError, "collections.Counter is not a partitioner"),
        (partitioner("NaturalIdPartitioner", partition_by="who"), DataError, "cannot be divided by NaturalId"),
        (partitioner("VerticalEvenPartitioner", num_partitions=2), DataError, "cannot be divided by VerticalEven"),
        (
            partitioner(
                "DirichletPartitioner", num_partitions=4, partition_by="label", alpha=0.1, min_partition_size=50
            ),
            DataError,
            r"cannot be divided by Dirichlet.*change its init_args",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_partitioners_that_cannot_work(make, partitioner, error, message):
    with pytest.raises(error, match=message):
        make(partitioner=partitioner)


def test_an_argument_of_the_partitioner_goes_over_a_configuration(make, tmp_path):
    """As an option does: jsonargparse puts `--data.partitioner.init_args.alpha 0.3` beside the init_args."""
    settings = partitioner("DirichletPartitioner", num_partitions=2, partition_by="label", alpha=0.5)
    path = tmp_path / "data.yaml"
    make()  # writes the table
    section = {"path": str(tmp_path / "table.parquet"), "partitioner": settings, "encoding": "Vectors"}
    path.write_text(yaml.safe_dump({"data": {"class_path": "PartitionedData", "init_args": section}}))
    for option in ("--data.partitioner.init_args.alpha", "--data.partitioner.alpha"):
        parser = FlowParser()
        parser.add_subclass_arguments(PartitionedData, "data")
        parser.add_argument("--config", action="config")
        made = parser.instantiate(parser.parse_args(["--config", str(path), option, "0.3"])).data
        expected = {**settings["init_args"], "alpha": 0.3}
        assert made.source_options()["partitioner"] == {**settings, "init_args": expected}


def test_columns_and_paths_that_are_not_there(make, tmp_path):
    with pytest.raises(DataError, match=r"has no column y, only x, label, writer, text: name the right ones"):
        make(encoding=Vectors())
    with pytest.raises(DataError, match=r"there is no .*nowhere.parquet: correct the path"):
        make(tmp_path / "nowhere.parquet")
    (tmp_path / "folder").mkdir()
    with pytest.raises(DataError, match=r"folder holds no files of one kind among .parquet, .csv"):
        make(tmp_path / "folder")


def test_a_damaged_file(make, tmp_path):
    datasets.Dataset.from_dict(TABLE).to_parquet(tmp_path / "table.parquet")
    content = (tmp_path / "table.parquet").read_bytes()
    (tmp_path / "table.parquet").write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match=r"table.parquet cannot be read \(.*: check that it is complete"):
        make(tmp_path / "table.parquet")
    assert not list((tmp_path / "cache").glob("PartitionedData-*"))


def test_the_hub_is_not_asked_unless_that_is_allowed(make, monkeypatch):
    def load(path, name, split, revision):
        asked.append((path, name, split, revision, datasets.config.HF_HUB_OFFLINE))
        return datasets.Dataset.from_dict(TABLE)

    with pytest.raises(DataError, match=r"data set nobody/nothing cannot be read \(.*set download to true, or put it"):
        make("nobody/nothing")
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    make("somebody/something", name="small", split="train+test", revision="v1", download=True)
    make("somebody/something", split="test")
    assert asked == [
        ("somebody/something", "small", "train+test", "v1", False),
        ("somebody/something", None, "test", None, True),
    ]
    assert datasets.config.HF_HUB_OFFLINE is False


def test_without_the_packages(make, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigurationError, match=r'needs datasets .*: pip install "datasets>='):
        make("nobody/nothing")


def image_arrays(random, **rows):
    """Pictures of 4 x 4 and their labels for each split, as an archive of a centralized data set has them."""
    arrays = {"class_names": np.array(["odd", "even"])}
    for split, count in rows.items():
        arrays[f"x_{split}"] = random.integers(256, size=(count, 4, 4, 3), dtype=np.uint8)
        arrays[f"y_{split}"] = np.arange(count, dtype=np.uint8) % 2
    return arrays


@pytest.mark.parametrize("split", ["train", "test", "train+test"])
def test_npz_with_splits(make, tmp_path, split):
    arrays = image_arrays(np.random.default_rng(0), train=20, test=8)
    np.savez(tmp_path / "images.npz", **arrays)
    linear = partitioner("LinearPartitioner", num_partitions=3)
    store = make(tmp_path / "images.npz", linear, Images("x", "y", 4, 4, 3), split=split).federation.store
    # a linear partitioner keeps the rows in their order
    clients = [store.read(client) for client in range(len(store))]
    parts = split.split("+")
    pictures = np.concatenate([arrays[f"x_{part}"] for part in parts])
    np.testing.assert_array_equal(np.concatenate([rows.x for rows in clients]), pictures.transpose(0, 3, 1, 2))
    np.testing.assert_array_equal(
        np.concatenate([rows.y for rows in clients]), np.concatenate([arrays[f"y_{part}"] for part in parts])
    )
    assert store.feature_dtype == np.uint8


def test_npz_with_natural_clients(make, tmp_path):
    """Arrays with as many rows are columns too; the names of the writers are not."""
    names = np.array(["ann", "bob", "cid"])
    table = {"x": np.arange(6.0), "label": np.arange(6) % 2, "writer": names[[2, 0, 0, 1, 2, 0]], "names": names}
    np.savez(tmp_path / "table.npz", **table)
    data = make(tmp_path / "table.npz", NATURAL)
    store = data.federation.store
    found = {store.name(client): store.read(client).x.tolist() for client in range(len(store))}
    assert found == {"ann": [1, 2, 5], "bob": [3], "cid": [0, 4]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda arrays: arrays.pop("y_test"), r"images.npz has no y_test, only class_names, x_train"),
        (
            lambda arrays: arrays.update(y_test=arrays["y_test"][1:]),
            r"images.npz has arrays of shapes .*'y_test': \(7,\)",
        ),
        (lambda arrays: arrays.update(x_test=arrays["x_test"][:, 1:]), r"splits train\+test do not match"),
        (lambda arrays: arrays.update(y_test=np.array([{}])), r"images.npz cannot be read .*numpy.savez"),
    ],
)
def test_npz_that_cannot_be_used(make, tmp_path, change, message):
    arrays = image_arrays(np.random.default_rng(0), train=20, test=8)
    change(arrays)
    np.savez(tmp_path / "images.npz", **arrays)
    with pytest.raises(DataError, match=message):
        make(tmp_path / "images.npz", IID, Images("x", "y", 4, 4, 3), split="train+test")


CIFAR10 = Path(__file__).resolve().parents[3] / "shared" / "data" / "cifar10_subset.npz"


@pytest.mark.slow
@pytest.mark.skipif(not CIFAR10.exists(), reason="needs cifar10_subset.npz in shared/data")
def test_cifar10_by_a_dirichlet_partitioner(make):
    dirichlet = partitioner(
        "DirichletPartitioner", num_partitions=80, partition_by="y", alpha=0.3, min_partition_size=10, seed=0
    )
    data = make(CIFAR10, dirichlet, Images("x", "y", 32, 32, 3, num_classes=10), split="train+test", test_fraction=0.2)
    store = data.federation.store
    labels = [np.bincount(store.read(client).y, minlength=10) for client in range(len(store))]
    assert sum(labels).tolist() == [500] * 10
    assert len(labels) == 80
    # ten labels are never spread evenly by so small an alpha
    assert np.mean([counts.max() / counts.sum() for counts in labels]) > 0.3
    assert data.feature_shape == (3, 32, 32)


@pytest.mark.parametrize("mode", ["1", "L", "P", "grey P", "RGB", "01"])
def test_pictures_of_every_mode(make, tmp_path, mode):
    """Two levels and palettes are pixels; bytes of 0 and 1 alone are not scaled."""
    image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
    channels = 3 if mode in ("P", "RGB") else 1
    pixels = np.random.default_rng(0).integers(0, 2, (20, 4, 4, channels)).astype(np.uint8) * (
        1 if mode == "01" else 255
    )
    pixels[0, 0, 0] = 0
    pictures = [image.fromarray(array.squeeze()) for array in pixels]
    if mode == "1":
        pictures = [picture.convert("1") for picture in pictures]
    elif mode.endswith("P"):
        pictures = [picture.convert("RGB").quantize(8) for picture in pictures]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("uint8")})
    table = datasets.Dataset.from_dict({"image": pictures, "label": np.arange(20) % 2}, features=features)
    table.to_parquet(tmp_path / "pictures.parquet")
    data = make(tmp_path / "pictures.parquet", encoding=Images(height=4, width=4, channels=channels), test_fraction=0)
    found = torch.cat([data.examples(client, "train")[0] for client in range(4)])
    assert found.unique().tolist() == [0, 1]
    assert found.sum() == (pixels > 0).sum()


@pytest.mark.parametrize(
    "labels", [np.arange(60).astype("u8") % 2, np.arange(60) % 2 == 1, np.arange(60.0) % 2, ["a", "b"] * 30]
)
def test_labels_of_any_type_and_copies_of_macos(make, tmp_path, labels):
    (tmp_path / "d").mkdir()
    encoding = Vectors(["n", "m"], "label", classes=["a", "b"] if isinstance(labels, list) else None)
    table = {"n": range(60), "m": [row % 2 == 0 for row in range(60)], "label": labels}
    datasets.Dataset.from_dict(table).to_parquet(tmp_path / "d" / "a.parquet")
    (tmp_path / "d" / "._a.parquet").write_bytes(b"\0\5\x16\7")
    data = make(tmp_path / "d", encoding=encoding)
    assert (
        data.federation.store.read(0).y.tolist()
        == data.federation.store.read(0).x[:, 0].astype(int).__mod__(2).tolist()
    )
    assert data.class_names == (("a", "b") if isinstance(labels, list) else ())
