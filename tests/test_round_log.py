"""A round's figures go where Lightning's own results go, at the same time."""

import csv

import pytest
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint

from flow_pl.loggers import RunLogger
from flow_pl.methods import FedAvg
from tests.test_module import fitted


class Watch(Callback):
    """Logs a number of its own, and keeps what is seen at two moments of a round."""

    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.seen.append(("batch", float(trainer.callback_metrics.get("step", 0))))

    def on_train_epoch_end(self, trainer, pl_module):
        self.seen.append(("round", float(trainer.callback_metrics["step"])))
        pl_module.log("mine", float(trainer.global_step))


def rows(folder):
    with next(folder.rglob("metrics.csv")).open() as file:
        return list(csv.DictReader(file))


def test_figures_reach_loggers_monitors_and_callbacks(tmp_path):
    watch = Watch()
    best = ModelCheckpoint(tmp_path / "checkpoints", monitor="train/global_loss", save_on_train_epoch_end=True)
    stop = EarlyStopping("train/clients", mode="max", patience=2, check_on_train_epoch_end=True)
    settings = {
        "callbacks": [watch, best, stop],
        "logger": RunLogger(tmp_path, name="log"),
        "enable_checkpointing": True,
        "limit_val_batches": 0,
    }
    _, run = fitted(tmp_path, FedAvg(), 9, settings)
    assert run.global_step == 3  # the number of clients does not grow: two rounds of patience
    # two chunks a round; in between, callbacks see the last round's figures
    one = [("batch", 0), ("batch", 0), ("round", 1)]
    assert watch.seen[:6] == [*one, ("batch", 1), ("batch", 1), ("round", 2)]
    logged = rows(tmp_path)
    assert [float(row["step"]) for row in logged] == [1, 2, 3]
    assert [float(row["mine"]) for row in logged] == [1, 2, 3]
    losses = [float(row["train/global_loss"]) for row in logged]
    assert float(best.best_model_score) == pytest.approx(min(losses))
    assert float(run.callback_metrics["train/global_loss"]) == pytest.approx(losses[-1])
    assert run.logged_metrics.keys() >= {"train/clients", "train/examples", "train/update_norm", "train/padding"}
    assert run.callback_metrics["train/bytes_up"].dtype == torch.float64


def test_a_round_without_a_loss_logs_no_loss(tmp_path):
    settings = {"logger": RunLogger(tmp_path, name="log"), "limit_val_batches": 0}
    with pytest.warns(UserWarning, match="none of the clients"):
        fitted(tmp_path, FedAvg(), 6, settings, sampling="poisson", cohort_size=1, chunk_size=12)
    logged = rows(tmp_path)
    assert [row["train/global_loss"] == "" for row in logged] == [row["train/clients"] == "0.0" for row in logged]
    assert {row["train/global_loss"] == "" for row in logged} == {True, False}
