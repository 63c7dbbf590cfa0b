"""All callbacks on two processes, one of which has nearly nothing to do: as on one."""

import csv
import io
import socket
import warnings
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
import rich
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from rich.console import Console
from torch.utils.data import DataLoader

from flow_pl import callbacks
from flow_pl.tasks import NextToken
from tests.callbacks.fakes import FakeData, FakeModule, evaluation_chunk, make_trainer, prediction_chunk

EVALUATED = [
    evaluation_chunk([(4, 2, 3, 1, 4, 1), (2, 0, 0, 0, 0, 2)], blocks=1, subset=[(3, 1, 2), (2, 0, 0)]),
    evaluation_chunk([(3, 1, 0, 0, 1, 3), (0, 0, 0, 0, 0, 0)], blocks=1, subset=[(0, 0, 0), (0, 0, 0)]),
    evaluation_chunk([], blocks=1, subset=[]),
]
PREDICTED = [
    prediction_chunk([0, 1], [[1, 1], [0, 0]], [[1, 0], [0, 0]], [[1, 1], [1, 0]], torch.ones(2, 2, 1).bool()),
    prediction_chunk([2], [[-1]], [[4]], [[1]], torch.zeros(1, 1, 1).bool()),
]


class SharedData(FakeData):
    """The last chunk is evaluated by the second process, all others by the first."""

    def _share(self, chunks: list[Any]) -> DataLoader[Any]:
        if self.trainer.world_size > 1:
            chunks = chunks[:-1] if self.trainer.global_rank == 0 else chunks[-1:]
        return DataLoader(chunks, batch_size=None)

    def val_dataloader(self) -> DataLoader[Any]:
        return self._share(self.chunks)

    predict_dataloader = val_dataloader

    def test_dataloader(self) -> list[DataLoader[Any]]:
        return [self._share(chunks) for chunks in self.test.values()]


def run(folder: Path, **settings: Any) -> dict[str, Any]:
    """Fit, test and predict; returns what this process saw."""
    screen = io.StringIO()
    rich._console = Console(file=screen, width=100)
    module, data = FakeModule(("head",), NextToken()), SharedData(EVALUATED, seen=EVALUATED, new=EVALUATED[1:2])
    measures = [callbacks.GeneralizedAccuracy(), callbacks.PersonalizedAccuracy(), callbacks.PersonalizationGain()]
    measures.append(callbacks.RoutingStatistics())
    measures.append(callbacks.ClientResults(folder / "clients.csv"))
    measures.append(callbacks.LearningCurves(folder / "curve.csv", folder / "curves.png"))
    shown = [callbacks.RoundProgressBar(), callbacks.ResultsTable(str(folder / "test.csv"))]
    best = ModelCheckpoint(folder, monitor="val/gain", save_on_train_epoch_end=False)
    trainer = make_trainer(*measures, *shown, best, max_epochs=2, enable_checkpointing=True, **settings)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(module, datamodule=data)
        metrics = dict(trainer.callback_metrics)
        trainer.test(module, datamodule=data)
        metrics |= trainer.callback_metrics
    for name in ("predictions.csv", "predictions.parquet"):
        writer = make_trainer(callbacks.PredictionWriter(str(folder / name)), **settings)
        writer.predict(FakeModule(("head",)), datamodule=SharedData(PREDICTED), return_predictions=False)
    return {
        "metrics": {name: value.item() for name, value in metrics.items()},
        "best": best.best_model_score.item(),
        "screen": screen.getvalue(),
        "unreduced": [str(warning.message) for warning in caught if "sync_dist" in str(warning.message)],
    }


def _run_as(rank: int, folder: Path, port: int) -> dict[str, Any]:
    environment = {"LOCAL_RANK": rank, "WORLD_SIZE": 2, "NODE_RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, str(value))
        seen = run(folder, strategy="ddp", devices=2)
        torch.distributed.destroy_process_group()
    return seen


def _second_process(_: int, folder: Path, port: int) -> None:
    torch.save(_run_as(1, folder, port), folder / "second.pt")


@pytest.mark.slow
def test_two_processes_show_and_write_what_one_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rich, "_console", None)  # `run` sets it
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    two.mkdir()
    expected = run(one)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    child = torch.multiprocessing.spawn(_second_process, args=(two, port), join=False)
    first = _run_as(0, two, port)
    child.join()
    second = torch.load(two / "second.pt")
    assert expected["metrics"]["val/personalized_accuracy_without_oov_eos"] == pytest.approx(2 / 5)
    for process in (first, second):
        assert process["metrics"] == pytest.approx(expected["metrics"], rel=0, abs=0, nan_ok=True)
    assert first["best"] == second["best"] == expected["best"]
    assert "Round 2/2" in first["screen"]
    assert "Flow with MLP, round 2" in first["screen"]
    assert not second["screen"]
    assert not first["unreduced"]
    for name in ("test.csv", "clients.csv", "predictions.csv"):
        assert (two / name).read_text() == (one / name).read_text()
    written = [pyarrow.parquet.read_table(folder / "predictions.parquet") for folder in (one, two)]
    assert written[0] == written[1]
    curves = [list(csv.DictReader((folder / "curve.csv").open())) for folder in (one, two)]
    for row in (*curves[0], *curves[1]):
        del row["train_seconds"]
    assert curves[0] == curves[1]
    assert not list(two.glob("*.part*"))
