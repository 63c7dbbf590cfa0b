"""The results of a test in a file, client by client."""

import csv
from pathlib import Path

import pytest
import torch

from flow_pl.callbacks import ClientResults
from flow_pl.callbacks.client_results import ClientCounts
from flow_pl.errors import ConfigurationError
from flow_pl.evaluation.counts import ClientEvaluation
from tests.callbacks.fakes import FakeData, FakeModule, evaluation_chunk, make_trainer

SEEN = [evaluation_chunk([(4, 2, 3, 1, 4, 1, 2), (2, 0, 0, 0, 0, 2, 0)], blocks=2)]
NEW = [evaluation_chunk([], blocks=2), evaluation_chunk([(0, 0, 0, 0, 0, 0, 0), (2, 2, 1, 1, 2, 0, 0)], blocks=2)]


def test_one_row_for_each_client_of_each_population(tmp_path: Path) -> None:
    """Clients 0 and 1 have 10 and 20 training examples; a client without evaluated targets has no row."""
    path = tmp_path / "new folder" / "clients.csv"
    trainer = make_trainer(ClientResults(str(path)))
    trainer.test(FakeModule(("conv1", "head")), datamodule=FakeData([], seen=SEEN, new=NEW), verbose=False)
    assert path.read_text().splitlines() == [
        "client,population,train_examples,evaluated,generalized_accuracy,personalized_accuracy,global_or_local_accuracy,"
        "routed_local/conv1,routed_local/head",
        '"client, 0",seen,10,4,0.5,0.75,1.0,0.25,0.5',
        '"client, 1",seen,20,2,0.0,0.0,0.0,1.0,0.0',
        '"client, 1",new,20,2,1.0,0.5,1.0,0.0,0.0',
    ]
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_a_method_without_local_model_or_routes_has_no_such_columns(tmp_path: Path) -> None:
    chunk = evaluation_chunk([(4, 2, 3, 1, float("nan"))])
    trainer = make_trainer(ClientResults(str(tmp_path / "clients.csv")))
    trainer.test(FakeModule(), datamodule=FakeData([], seen=[chunk]), verbose=False)
    (row,) = csv.DictReader((tmp_path / "clients.csv").open())
    assert list(row)[4:] == ["generalized_accuracy", "personalized_accuracy"]


def test_validation_writes_nothing(tmp_path: Path) -> None:
    trainer = make_trainer(ClientResults(str(tmp_path / "clients.csv")))
    trainer.validate(FakeModule(("conv1", "head")), datamodule=FakeData(SEEN), verbose=False)
    assert not list(tmp_path.iterdir())


def test_clients_are_told_apart_in_any_population() -> None:
    """Neighbours above 2^24, where single precision has gaps, and out of order."""
    client = torch.tensor([2**26 + 3, 2**26 + 1, 2**26 + 2])
    ones = torch.ones(3)
    counts = ClientCounts(blocks=0)
    counts.update(ClientEvaluation(client, ones, ones, ones, ones, ones, ones, ones))
    assert counts.compute()[0].tolist() == [2**26 + 1, 2**26 + 2, 2**26 + 3]


def test_unusable_paths_are_refused_before_the_test(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"expected a name that ends in \.csv"):
        ClientResults("clients.txt")
    (tmp_path / "file").touch()
    trainer = make_trainer(ClientResults(str(tmp_path / "file" / "clients.csv")))
    with pytest.raises(ConfigurationError, match="cannot be written"):
        trainer.test(FakeModule(), datamodule=FakeData([], seen=SEEN))
