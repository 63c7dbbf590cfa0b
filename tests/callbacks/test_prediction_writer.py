"""Predictions in files: rows, missing labels, routes, and what is left after a failure."""

import csv
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
import torch

from flow_pl.callbacks import PredictionWriter
from flow_pl.errors import ConfigurationError, DataError
from flow_pl.evaluation.counts import ClientPredictions
from flow_pl.tasks import MultiLabel, NextToken, Objective
from tests.callbacks.fakes import Chunk, FakeData, FakeModule, make_trainer, prediction_chunk

CHUNKS = [
    prediction_chunk(
        clients=[3, 12],
        label=[[1, -1, 0], [2, 0, 0]],
        prediction=[[1, 5, 0], [1, 7, 7]],
        mask=[[1, 1, 0], [1, 0, 0]],
        local=torch.tensor([[[1, 0], [0, 1], [0, 0]], [[1, 1], [0, 0], [0, 0]]]).bool(),
    ),
    prediction_chunk([], [], [], [], local=torch.empty(0, 0, 2)),
    prediction_chunk([5], [[1]], [[0]], [[1]], local=torch.zeros(1, 1, 2).bool()),
]
CSV = """\
client,population,instance,prediction,label,generalized_correct,personalized_correct,route_conv1,route_head
"client, 3",seen,0,1,1,true,true,local,global
"client, 3",seen,1,5,,,,global,local
"client, 12",new,0,1,2,false,false,local,local
"client, 5",seen,0,0,1,true,false,global,global
"""


def predict(
    path: Path,
    chunks: list[Chunk] = CHUNKS,
    routes: tuple[str, ...] = ("conv1", "head"),
    objective: Objective | None = None,
) -> None:
    trainer = make_trainer(PredictionWriter(str(path)))
    trainer.predict(FakeModule(routes, objective), datamodule=FakeData(chunks), return_predictions=False)


def test_csv(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "predictions.csv"
    predict(path)
    assert path.read_text() == CSV
    assert list(path.parent.iterdir()) == [path]


def test_parquet(tmp_path: Path) -> None:
    path = tmp_path / "predictions.parquet"
    predict(path)
    rows = pyarrow.parquet.read_table(path).to_pylist()
    written = [{name: _text(value) for name, value in row.items()} for row in rows]
    assert written == list(csv.DictReader(CSV.splitlines()))
    assert pyarrow.parquet.ParquetFile(path).num_row_groups == 1
    assert [type(value) for value in rows[0].values()] == [str, str, int, int, int, bool, bool, str, str]


def _text(value: Any) -> str:
    return {None: "", True: "true", False: "false"}[value] if value is None or isinstance(value, bool) else str(value)


TOKENS = [
    Chunk(
        ClientPredictions(
            client=torch.tensor([3, 12]),
            mask=torch.tensor([[[1, 1, 0], [0, 1, 0]], [[1, 0, 0], [0, 0, 0]]]).bool(),
            label=torch.tensor([[[5, 3, 0], [0, -1, 0]], [[7, 0, 0], [0, 0, 0]]]),
            prediction=torch.tensor([[[5, 9, 8], [8, 6, 8]], [[7, 8, 8], [8, 8, 8]]]),
            generalized_correct=torch.tensor([[[1, 1, 1], [0, 0, 0]], [[0, 0, 0], [0, 0, 0]]]).bool(),
            personalized_correct=torch.tensor([[[1, 0, 1], [0, 0, 0]], [[1, 0, 0], [0, 0, 0]]]).bool(),
            routes=torch.tensor([[[[0], [1], [1]], [[0], [1], [1]]], [[[0], [0], [0]], [[1], [1], [1]]]]).bool(),
        ),
        clients=2,
    ),
    prediction_chunk([], [], [], [], local=torch.empty(0, 0, 1)),
]
TOKENS_CSV = """\
client,population,instance,position,prediction,label,generalized_correct,personalized_correct,route_lstm
"client, 3",seen,0,0,5,5,true,true,global
"client, 3",seen,0,1,9,3,true,false,local
"client, 3",seen,1,1,6,,,,local
"client, 12",new,0,0,7,7,false,true,global
"""


def test_tokens_have_a_row_each(tmp_path: Path) -> None:
    """Positions outside the mask are padding and have none; a chunk without clients has no tokens to count."""
    predict(tmp_path / "p.csv", TOKENS, ("lstm",), NextToken())
    assert (tmp_path / "p.csv").read_text() == TOKENS_CSV


LABELS = [
    Chunk(
        ClientPredictions(
            client=torch.tensor([3]),
            mask=torch.tensor([[1, 1, 1, 0]]).bool(),
            label=torch.tensor([[[1, 0, 1], [0, 0, 0], [-1, -1, -1], [0, 0, 0]]]),
            prediction=torch.tensor([[[2, 0], [1, 0], [0, 2], [0, 1]]]),
            generalized_correct=torch.tensor([[[0, 0, 1], [0, 0, 0], [0, 0, 0], [0, 0, 0]]]).bool(),
            personalized_correct=torch.tensor([[[1, 0, 1], [0, 0, 0], [0, 0, 0], [0, 0, 0]]]).bool(),
        ),
        clients=1,
    ),
]
LABELS_CSV = """\
client,population,instance,prediction,label,generalized_correct,personalized_correct
"client, 3",seen,0,2 0,0 2,1,2
"client, 3",seen,1,1 0,,0,0
"client, 3",seen,2,0 2,,,
"""


def test_several_labels_are_listed_in_one_row(tmp_path: Path) -> None:
    """An instance with both labels found by one model, one without a true label, and one without a label."""
    for ending in (".csv", ".parquet"):
        predict(tmp_path / f"p{ending}", LABELS, (), MultiLabel(k=2))
    assert (tmp_path / "p.csv").read_text() == LABELS_CSV
    rows = pyarrow.parquet.read_table(tmp_path / "p.parquet").to_pylist()
    assert [tuple(row.values())[3:] for row in rows] == [
        ([2, 0], [0, 2], 1, 2),
        ([1, 0], [], 0, 0),
        ([0, 2], None, None, None),
    ]


def test_a_method_without_routes_has_no_route_columns(tmp_path: Path) -> None:
    predict(tmp_path / "p.csv", [prediction_chunk([0], [[1]], [[1]], [[1]])], routes=())
    assert (tmp_path / "p.csv").read_text().splitlines()[0].endswith("personalized_correct")


def test_nothing_to_predict_writes_a_header(tmp_path: Path) -> None:
    for ending in (".csv", ".parquet"):
        predict(tmp_path / f"p{ending}", CHUNKS[1:2])
    assert (tmp_path / "p.csv").read_text().splitlines() == CSV.splitlines()[:1]
    assert pyarrow.parquet.read_table(tmp_path / "p.parquet").num_rows == 0


@pytest.mark.filterwarnings("ignore:predict returned None")
def test_a_failed_run_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "predictions.csv"
    path.write_text("old")
    with pytest.raises(AttributeError):
        predict(path, [CHUNKS[0], Chunk(None, 1)])
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", ["predictions.txt", "predictions"])
def test_other_endings_are_refused_at_construction(name: str) -> None:
    with pytest.raises(ConfigurationError, match=r"expected a name that ends in \.csv or \.parquet"):
        PredictionWriter(name)


def test_an_unusable_folder_is_refused_before_predicting(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder.csv").mkdir()
    for path, message in ((tmp_path / "file" / "p.csv", "cannot be written"), (tmp_path / "folder.csv", "is a folder")):
        with pytest.raises(ConfigurationError, match=message):
            predict(path)


def test_parquet_without_pyarrow_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ConfigurationError, match=r'pip install "pyarrow>='):
        predict(tmp_path / "p.parquet")
    assert not list(tmp_path.iterdir())


def test_a_part_that_is_elsewhere_is_missed(tmp_path: Path) -> None:
    (tmp_path / "p.csv.part0").touch()
    with pytest.raises(DataError, match=r"p\.csv\.part1 not found .* a folder that all machines share"):
        PredictionWriter(str(tmp_path / "p.csv"))._join(processes=2)
