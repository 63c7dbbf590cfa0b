import os
import pickle
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import pytest
import torch
from jsonargparse import ArgumentError, ArgumentParser
from torch.utils.data.distributed import DistributedSampler

from flow_pl.data import (
    ArrayData,
    ClientData,
    DigitsData,
    FederatedDataModule,
    Images,
    NextCharacter,
    NextWord,
    SyntheticData,
    TagPrediction,
    Vectors,
)
from flow_pl.errors import ConfigurationError, DataError


class Squares(FederatedDataModule):
    """A data set of one's own, in ten lines: client c has 10 + c black or white images."""

    def __init__(self, num_clients: int = 12, dtype: str = "uint8", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.num_clients, self.dtype, self.reads = num_clients, dtype, 0

    def options(self):
        return {"num_clients": self.num_clients, "dtype": self.dtype}

    def clients(self):
        self.reads += 1
        for client in range(self.num_clients):
            y = np.arange(10 + client) % 2
            yield ClientData(f"c{client}", np.full((10 + client, 1, 2, 2), 255) * y[:, None, None, None], y)

    def class_count(self):
        return 2

    def prepare(self):
        self.prepare_data()
        self.setup()
        return self


class Typed(Squares):
    def clients(self):
        for name, x, y, *_ in super().clients():
            yield ClientData(name, x.astype(self.dtype), y)


@pytest.fixture
def make(tmp_path):
    def make(cls=Typed, **settings):
        return cls(**({"cache_dir": str(tmp_path), "cohort_size": 5, "chunk_size": 3} | settings))

    return make


def clients_of(loader):
    return [batch.client.tolist() for batch in loader]


def test_a_store_is_written_once_for_equal_options(make, tmp_path):
    first = make().prepare()
    again = make(cohort_size=3, val_fraction=0.3, seed=5).prepare()
    assert (first.reads, again.reads) == (1, 0)
    assert len(list(tmp_path.iterdir())) == 1
    assert make(num_clients=11).prepare().reads == 1
    assert make(Squares).prepare().reads == 1  # another class of the same options
    assert sorted(path.name.partition("-")[0] for path in tmp_path.iterdir()) == ["Squares", "Typed", "Typed"]


def test_the_cache_is_found_in_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("FLOW_PL_CACHE", str(tmp_path / "a" / "b"))
    Typed().prepare_data()
    assert len(list((tmp_path / "a" / "b").iterdir())) == 1
    monkeypatch.delenv("FLOW_PL_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    Typed().prepare_data()
    assert len(list((tmp_path / "home/.cache/flow_pl").iterdir())) == 1


def test_training_and_evaluation_see_the_clients_they_should(make):
    data = make(new_client_fraction=0.25, val_clients=4).prepare()
    seen, new = set(data.federation.seen.tolist()), set(data.federation.new.tolist())
    assert (len(seen), len(new)) == (9, 3)
    train, val = data.train_dataloader(), data.val_dataloader()
    trained = set()
    for epoch in range(30):
        train.sampler.set_epoch(epoch)
        cohort = clients_of(train)
        assert [len(chunk) for chunk in cohort] == [3, 2] == [len(cohort[i]) for i in range(len(train))]
        trained |= {client for chunk in cohort for client in chunk}
    assert trained == seen
    assert sum(len(chunk) for chunk in clients_of(val)) == 4
    first = clients_of(val)
    val.sampler.set_epoch(1)
    assert clients_of(val) == first, "a best round can only be chosen among rounds of the same clients"
    assert data.test_populations == ("seen", "new")
    tested = [{client for chunk in clients_of(loader) for client in chunk} for loader in data.test_dataloader()]
    assert tested == [seen, new]
    predicted = [client for chunk in clients_of(data.predict_dataloader()) for client in chunk]
    assert sorted(predicted) == list(range(12))
    assert {data.population(client) for client in new} == {"new"}
    assert data.client_name(7) == "c7"


def test_without_new_clients_there_is_one_test_loader(make):
    data = make(new_client_fraction=0).prepare()
    assert data.test_populations == ("seen",)
    assert len(data.test_dataloader()) == 1


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [("uint8", torch.float32), ("float64", torch.float32), ("float16", torch.float32), ("int32", torch.int64)],
)
def test_features_are_transformed_after_the_move_to_the_device(make, dtype, expected):
    data = make(dtype=dtype).prepare()
    batch = next(iter(data.test_dataloader()[0]))
    assert batch.train.x.dtype == batch.heldout.x.dtype == getattr(torch, dtype)
    moved = data.on_after_batch_transfer(data.transfer_batch_to_device(batch, torch.device("cpu"), 0), 0)
    for examples in (moved.train, moved.heldout):
        assert examples.x.dtype == expected
        assert examples.x.max() == (1 if dtype == "uint8" else 255)
    assert torch.equal(moved.order, batch.order)
    assert data.example().shape == (1, 1, 2, 2)
    assert data.example().dtype == expected
    assert (data.feature_shape, data.num_classes) == ((1, 2, 2), 2)


def test_loader_workers_change_nothing(make):
    found = []
    for workers in (0, 2):
        data = make(num_workers=workers, seed=3).prepare()
        loader = data.train_dataloader()
        batches = []
        for epoch in (0, 1):
            loader.sampler.set_epoch(epoch)
            batches += list(loader)
        found.append(batches)
    for one, other in zip(*found, strict=True):
        assert one.round == other.round
        for name in ("client", "key", "part", "order"):
            assert torch.equal(getattr(one, name), getattr(other, name))
        assert torch.equal(one.train.x, other.train.x)
    assert found[0][0].order.shape[1] == 1, "no module says that it needs more"


def test_datasets_can_be_sent_to_spawned_workers(make):
    dataset = make().prepare().train_dataloader().dataset
    assert len(pickle.loads(pickle.dumps(dataset)).federation.store) == 12


def test_loaders_draw_nothing_from_the_global_generator(make):
    loader = make().prepare().train_dataloader()
    before = torch.get_rng_state()
    list(loader)
    assert torch.equal(before, torch.get_rng_state())


def test_the_seed_is_that_of_the_run_unless_given(make, monkeypatch):
    def cohort(seed=None):
        return clients_of(make(seed=seed).prepare().train_dataloader())

    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    assert cohort() == cohort(0)
    monkeypatch.setenv("PL_GLOBAL_SEED", "7")
    assert cohort() == cohort(7) != cohort(0)


class Recorder(lightning.LightningModule):
    """Notes which clients come in which step, and learns nothing."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.steps, self.dtypes = [], set()

    def note(self, stage, batch):
        self.steps.append((stage, batch.round, tuple(batch.client.tolist())))
        self.dtypes.add(batch.train.x.dtype)

    def training_step(self, batch):
        self.note("train", batch)
        return self.weight.sum() * 0

    def validation_step(self, batch):
        self.note("val", batch)

    def test_step(self, batch, batch_idx, dataloader_idx=0):
        self.note(f"test {dataloader_idx}", batch)

    def predict_step(self, batch):
        self.note("predict", batch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters())

    def clients(self, stage):
        return sorted(client for name, _, clients in self.steps if name == stage for client in clients)


def make_trainer(**settings):
    return lightning.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"max_epochs": 2} | settings,
    )


@pytest.mark.parametrize(("precision", "dtype"), [("32-true", torch.float32), ("64-true", torch.float64)])
def test_lightning_runs_every_stage(make, precision, dtype):
    data, model, trainer = make(), Recorder(), make_trainer(precision=precision, num_sanity_val_steps=0)
    trainer.fit(model, data)
    rounds = [round_ for stage, round_, _ in model.steps if stage == "train"]
    assert rounds == [0, 0, 1, 1]
    assert model.clients("val") == sorted(data.federation.seen.tolist() * 2)
    trainer.test(model, data, verbose=False)
    assert model.clients("test 0") == data.federation.seen.tolist()
    assert model.clients("test 1") == data.federation.new.tolist()
    trainer.predict(model, data)
    assert model.clients("predict") == list(range(12))
    assert model.dtypes == {dtype}


def test_lightning_trains_without_any_row_to_evaluate_on_and_evaluates_nothing(make):
    data, model, trainer = make(val_fraction=0, test_fraction=0), Recorder(), make_trainer()
    trainer.fit(model, data)
    assert {stage for stage, _, _ in model.steps} == {"train"}
    assert data.test_populations == ()
    with pytest.raises(ConfigurationError, match=r"no client has test examples.*Set data.test_fraction, which is 0"):
        trainer.test(model, data, verbose=False)
    with pytest.raises(ConfigurationError, match=r"no client has validation examples.*data.val_fraction, which is 0"):
        trainer.validate(model, data, verbose=False)
    with pytest.raises(ConfigurationError, match=r"no client has test examples and none without a label"):
        trainer.predict(model, data)
    assert {stage for stage, _, _ in model.steps} == {"train"}


def test_lightning_does_not_wrap_the_sampler_in_one_that_drops_clients(make):
    assert isinstance(make().prepare().train_dataloader().sampler, DistributedSampler)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"cohort_size": 12}, "cohort_size is 12, but there are only 11 clients"),
        ({"val_clients": 12}, "val_clients is 12, but there are only 11 clients"),
        ({"chunk_size": 0}, "chunk_size is 0"),
        ({"split_seed": -1}, "split_seed is -1, expected a whole number of 0 or more"),
        ({"seed": -1}, "seed is -1, expected a whole number of 0 or more"),
        ({"num_workers": -1}, "num_workers is -1, expected a whole number of 0 or more"),
        ({"val_fraction": 2}, "val_fraction is 2"),
    ],
)
def test_settings_that_cannot_work_stop_before_training(make, settings, message):
    model = Recorder()
    with pytest.raises(ConfigurationError, match=message):
        make_trainer(num_sanity_val_steps=0).fit(model, make(**settings))
    assert not [step for step in model.steps if step[0] == "train"]


def test_a_store_that_is_not_there(make):
    with pytest.raises(DataError, match=r"there is no client store .*: call prepare_data\(\) first"):
        make().setup("fit")
    with pytest.raises(RuntimeError, match=r"call prepare_data\(\) and setup\(\) first"):
        _ = make().num_classes


def test_a_store_that_is_damaged(make, tmp_path):
    make().prepare_data()
    (store,) = tmp_path.iterdir()
    os.truncate(store / "x.npy", 200)
    with pytest.raises(DataError, match=r"x.npy is not a usable part .*: delete .* it will be rebuilt"):
        make().prepare()


def test_a_cache_that_cannot_be_written_to(make, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigurationError, match=r"cannot be written .*set cache_dir.* FLOW_PL_CACHE"):
        make(cache_dir=str(tmp_path / "file")).prepare_data()


def make_parser():
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(FederatedDataModule, "data")
    return parser


@pytest.mark.parametrize("cls", [SyntheticData, DigitsData, ArrayData])
def test_the_command_line_knows_the_settings_of_every_data_set(cls):
    arguments = [f"--data=flow_pl.data.{cls.__name__}", "--data.cohort_size=3", "--data.val_clients=null"]
    arguments += ["--data.path=a.npz"] if cls is ArrayData else ["--data.num_clients=8"]
    parsed = make_parser().parse_args(arguments)
    assert parsed.data.init_args.cohort_size == 3
    assert parsed.data.init_args.split_seed == 0
    assert cls(**parsed.data.init_args.as_dict()).cohort_size == 3


@pytest.mark.parametrize(
    ("data", "encoding"),
    [
        (["EmnistData", "--data.folder=f", "--data.only_digits=true", "--data.download=true"], Images),
        (["Cifar100Data", "--data.folder=f", "--data.client_fraction=0.5"], Images),
        (["ShakespeareData", "--data.folder=f"], NextCharacter),
        (["StackOverflowData", "--data.folder=f", "--data.max_examples=null"], NextWord),
        (["StackOverflowTagsData", "--data.folder=f", "--data.num_tags=50"], TagPrediction),
        (["HDF5Data", "--data.train=f", "--data.encoding=Images", "--data.encoding.image=pixels"], Images),
        (["LeafData", "--data.train=[f, g]", "--data.encoding=NextWord", "--data.encoding.text=x"], NextWord),
        (
            [
                "PartitionedData",
                "--data.path=f",
                "--data.encoding=Vectors",
                "--data.partitioner={class_path: flwr_datasets.partitioner.IidPartitioner, init_args: {}}",
            ],
            Vectors,
        ),
    ],
)
def test_the_command_line_reads_published_data(data, encoding):
    pytest.importorskip("flwr_datasets", reason="flwr-datasets is not installed")
    parser = make_parser()
    made = parser.instantiate(parser.parse_args(["--data=" + data[0], *data[1:], "--data.cohort_size=3"])).data
    assert type(made).__name__ == data[0]
    assert made.cohort_size == 3
    assert isinstance(made.encoding, encoding)


@pytest.mark.parametrize(
    ("argument", "message"),
    [("--data.cohort_sise=3", "cohort_sise"), ("--data.cohort_size=many", "cohort_size"), ("--data.beta=x", "beta")],
)
def test_the_command_line_rejects_unknown_keys_and_wrong_types(argument, message):
    with pytest.raises(ArgumentError, match=message):
        make_parser().parse_args(["--data=flow_pl.data.SyntheticData", argument])


def test_the_command_line_explains_every_setting(capsys):
    parser = ArgumentParser()
    parser.add_class_arguments(SyntheticData, "data")
    text = " ".join(parser.format_help().split())
    assert "--data.shared_fraction SHARED_FRACTION share of the instances" in text
    assert "--data.cohort_size COHORT_SIZE number of clients sampled in a round" in text


def test_a_clients_examples_are_given_as_a_model_gets_them(make):
    """Each part of the split once, with the features in step with the targets."""

    class Fractions(Squares):
        def transform(self, x):
            return x.float() / 255

    data = make(Fractions).prepare()
    client = int(data.federation.new[0])
    total = 0
    for part in ("train", "val", "test"):
        x, y = data.examples(client, part)
        assert (x.dtype, y.dtype) == (torch.float32, torch.int64)
        assert x.shape == (len(y), 1, 2, 2)
        assert torch.equal(x[:, 0, 0, 0], y.float())  # white = 1
        total += len(y)
    assert total == 10 + int(data.client_name(client)[1:])
    assert len(data.examples(client, "unlabelled")[0]) == 0


UNIPEN = Path(__file__).resolve().parents[3] / "shared" / "data" / "unipen_writers_small.npz"


@pytest.mark.skipif(not UNIPEN.exists(), reason=f"needs {UNIPEN.name} in shared/data")
def test_handwriting_by_natural_writers(make):
    data = make(ArrayData, path=str(UNIPEN), feature_shape=[1, 28, 28], num_classes=62)
    data.prepare_data()
    data.setup()
    assert data.feature_shape == (1, 28, 28)
    assert len(data.federation.store) == 20
    with np.load(UNIPEN, allow_pickle=False) as file:
        mine = file["client"] == 4
        np.testing.assert_array_equal(data.federation.store.read(4).x[:, 0], file["x"][mine])
        assert data.client_name(4) == file["client_names"][4]
    batch = next(iter(data.train_dataloader()))
    assert batch.train.x.shape == (3, 70, 1, 28, 28)
    assert batch.train.x.dtype == torch.uint8
