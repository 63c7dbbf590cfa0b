"""The x-axis of everything that is logged: rounds, whatever the number of chunks."""

import csv
import json

import pytest
import torch
from lightning.pytorch.callbacks import Callback, DeviceStatsMonitor, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import Logger

from flow_pl.loggers import RunLogger
from flow_pl.methods import FedAvg
from tests.test_module import data, fitted, module, trainer

ROUNDS = 3


class Logged(Logger):
    """What is logged: step and names."""

    name, version = "logged", 0

    def __init__(self):
        super().__init__()
        self.rows = []

    def log_metrics(self, metrics, step=None):
        self.rows += [(name, step, float(value)) for name, value in metrics.items()]

    def log_hyperparams(self, *args, **kwargs):
        """Nothing."""

    def steps(self, start):
        return [step for name, step, _ in self.rows if name.startswith(start)]


class OnStep(Callback):
    """A user's callback that logs for every batch."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        pl_module.log("mine/on_step", float(trainer.current_epoch), on_step=True, on_epoch=False, batch_size=1)


def halving():
    return {
        "server_optimizer": lambda p: torch.optim.SGD(p, lr=1.0),
        "server_scheduler": lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5),
    }


QUICK = ((None, 3), ("step", 1), ("epoch", 3))
"""Each interval with several chunks a round."""


@pytest.mark.parametrize(
    ("interval", "chunk_size"),
    [
        pytest.param(interval, size, marks=[] if (interval, size) in QUICK else pytest.mark.slow)
        for interval in (None, "step", "epoch")
        for size in (6, 3, 1)
    ],
)
def test_learning_rates_are_logged_by_round(tmp_path, chunk_size, interval):
    """The rate that round r trains with stands at r, as with one chunk a round."""
    logger = Logged()
    settings = {"logger": logger, "callbacks": [LearningRateMonitor(interval)], "log_every_n_steps": 1}
    fitted(tmp_path, FedAvg(), ROUNDS, settings, halving(), chunk_size=chunk_size)
    rates = {(step, rate) for name, step, rate in logger.rows if name.startswith("lr-")}
    assert rates == {(0, 1.0), (1, 0.5), (2, 0.25)}


@pytest.mark.parametrize("chunk_size", [pytest.param(6, marks=pytest.mark.slow), 3])
def test_what_is_logged_by_batch_is_on_the_axis_of_rounds(tmp_path, chunk_size):
    logger = Logged()
    settings = {"logger": logger, "callbacks": [OnStep(), DeviceStatsMonitor(cpu_stats=True)], "log_every_n_steps": 1}
    _, run = fitted(tmp_path, FedAvg(), ROUNDS, settings, chunk_size=chunk_size)
    assert {(step, value) for name, step, value in logger.rows if name == "mine/on_step"} == {(0, 0), (1, 1), (2, 2)}
    assert set(logger.steps("DeviceStatsMonitor")) == {0, 1, 2}
    assert logger.steps("train/clients") == logger.steps("val/personalized_loss") == [1, 2, 3]
    assert run.global_step == ROUNDS


def test_a_resumed_run_goes_on_with_the_axis(tmp_path):
    checkpoint = ModelCheckpoint(tmp_path / "ckpt", save_last=True)
    first = {"callbacks": [checkpoint], "enable_checkpointing": True, "logger": Logged()}
    fitted(tmp_path, FedAvg(), 2, first, halving())
    logger = Logged()
    run = trainer(4, logger=logger, callbacks=[LearningRateMonitor(), OnStep()], log_every_n_steps=1)
    run.fit(module(FedAvg(), **halving()), datamodule=data(tmp_path / "cache"), ckpt_path=tmp_path / "ckpt/last.ckpt")
    assert {(step, rate) for name, step, rate in logger.rows if name.startswith("lr-")} == {(2, 0.25), (3, 0.125)}
    assert set(logger.steps("mine/")) == {2, 3}
    assert logger.steps("train/clients") == [3, 4]


def test_the_runs_own_file(tmp_path):
    logger = RunLogger(str(tmp_path), name="")
    settings = {"logger": logger, "callbacks": [LearningRateMonitor()], "log_every_n_steps": 1}
    fitted(tmp_path, FedAvg(), ROUNDS, settings, halving())
    with open(logger.experiment.metrics_file_path, encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert {row["step"]: row["lr-SGD"] for row in rows if row["lr-SGD"]} == {"0": "1.0", "1": "0.5", "2": "0.25"}


def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboard", reason="TensorBoard is not installed")
    from lightning.pytorch.loggers import TensorBoardLogger
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = TensorBoardLogger(str(tmp_path / "tensorboard"))
    settings = {"logger": logger, "callbacks": [LearningRateMonitor()], "log_every_n_steps": 1}
    fitted(tmp_path, FedAvg(), ROUNDS, settings, halving())
    logger.finalize("success")
    events = EventAccumulator(logger.log_dir).Reload()
    assert [(e.step, e.value) for e in events.Scalars("lr-SGD")] == [(0, 1.0), (1, 0.5), (2, 0.25)]


def test_wandb(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="wandb is not installed")
    from lightning.pytorch.loggers import WandbLogger

    from tests.wandb_files import offline_runs

    monkeypatch.setenv("WANDB_MODE", "offline")
    logger = WandbLogger(save_dir=str(tmp_path), offline=True)
    settings = {"logger": logger, "callbacks": [LearningRateMonitor()], "log_every_n_steps": 1}
    fitted(tmp_path, FedAvg(), ROUNDS, settings, halving())
    logger.experiment.finish()
    (run,) = offline_runs(tmp_path)
    rates = [(json.loads(str(r["trainer/global_step"])), r["lr-SGD"]) for r in run.rows("lr-SGD")]
    assert rates == [(0, 1.0), (1, 0.5), (2, 0.25)]
