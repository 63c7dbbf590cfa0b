"""Clients whose update is not finite, whose data is damaged, or that do not report back."""

import warnings

import lightning
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import Logger

import flow_pl.engine.server_round
from flow_pl import FederatedLoop, FederatedModule
from flow_pl.data import ArrayData
from flow_pl.data.availability import Availability
from flow_pl.engine.attacks import Attack
from flow_pl.engine.server_round import DivergenceError
from flow_pl.errors import DataError
from flow_pl.methods import Ditto, FedAvg
from flow_pl.models import MLP
from flow_pl.module import EmptyRoundWarning, RejectedClientWarning

GOOD, ROWS = 5, 12


def arrays(folder, bad=0, factor=1e30, **settings):
    """Five clients, and some whose features make any training overflow."""
    random = np.random.default_rng(0)
    clients = GOOD + bad
    x = random.normal(size=(10 * ROWS, 4)).astype(np.float32)[: clients * ROWS]
    x[GOOD * ROWS :] *= factor
    y = np.arange(len(x)) % 3
    names = np.array([f"client-{i}" for i in range(clients)])
    folder.mkdir(exist_ok=True)
    np.savez(folder / "data.npz", x=x, y=y, client=np.repeat(names, ROWS))
    settings = {"cohort_size": clients, "chunk_size": 4, "new_client_fraction": 0.0, "seed": 0} | settings
    return ArrayData(path=str(folder / "data.npz"), cache_dir=str(folder), **settings)


def fit(data, method=None, rounds=2, **settings):
    torch.manual_seed(0)
    loop = FederatedLoop(1, None, 3, lambda p: torch.optim.SGD(p, lr=0.1))
    model = FederatedModule(MLP(4, 3, (5,)), FedAvg() if method is None else method, loop, **settings)
    trainer = lightning.Trainer(
        max_epochs=rounds, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, inference_mode=False, use_distributed_sampler=False,
        limit_val_batches=0,
    )  # fmt: skip
    trainer.fit(model, datamodule=data)
    return model, {name: float(value) for name, value in trainer.callback_metrics.items()}


def weights(model):
    return torch.cat([p.detach().reshape(-1) for p in model.server.parameters()])


@pytest.fixture(params=[True, False], ids=["host", "other devices"])
def asked(request, monkeypatch):
    """Both ways to find them: the sums are asked for, or every client is looked at."""
    if not request.param:
        monkeypatch.setattr(flow_pl.engine.server_round, "_known_to_be_finite", lambda update: False)


@pytest.mark.parametrize("factor", [1e30, 1e37])
def test_a_client_that_diverges_is_left_out_and_named(tmp_path, asked, factor):
    """The round is that of the other clients, which draw as they do without it."""
    expected, _ = fit(arrays(tmp_path / "good"))
    with pytest.warns(RejectedClientWarning, match="round 1: client 'client-5' is left out: its update is not finite"):
        model, figures = fit(arrays(tmp_path / "bad", bad=1, factor=factor))
    torch.testing.assert_close(weights(model), weights(expected), rtol=0, atol=1e-6)
    assert (figures["train/rejected_clients"], figures["train/clients"]) == (1, GOOD)
    assert np.isfinite(figures["train/global_loss"])


def test_what_a_rejected_client_keeps_is_what_it_had(tmp_path, asked):
    with pytest.warns(RejectedClientWarning):
        model, _ = fit(arrays(tmp_path, bad=1), Ditto())
    assert model.states.known().tolist() == list(range(GOOD))


def test_too_many_rejected_clients_stop_the_run(tmp_path, asked):
    with pytest.raises(DivergenceError, match=r"round 0: the updates of 3 of 8 clients .* the share of 0.3 .*lower"):
        fit(arrays(tmp_path, bad=3), max_rejected=0.3)


def test_a_good_round_warns_of_nobody(tmp_path, asked):
    with warnings.catch_warnings():
        warnings.simplefilter("error", RejectedClientWarning)
        _, figures = fit(arrays(tmp_path))
    assert figures["train/rejected_clients"] == 0


def damaged(folder):
    """A store in whose file a label of the last client has changed after it was written."""
    data = arrays(folder, bad=1, factor=1)
    data.prepare_data()
    file = data.store_path / "y.npy"
    labels = np.load(file, mmap_mode="r+")
    labels[GOOD * ROWS + 1] = 100
    labels.flush()
    return data


def test_a_client_with_damaged_data_is_left_out_of_training(tmp_path):
    expected, _ = fit(arrays(tmp_path / "good"))
    with pytest.warns(RejectedClientWarning, match=r"client 'client-5' is left out: .* has the label 100 in row 1"):
        model, figures = fit(damaged(tmp_path / "bad"))
    torch.testing.assert_close(weights(model), weights(expected), rtol=0, atol=1e-6)
    assert (figures["train/rejected_clients"], figures["train/clients"]) == (1, GOOD)


def test_a_client_with_damaged_data_is_never_evaluated(tmp_path):
    data = damaged(tmp_path)
    data.setup("test")
    with pytest.raises(DataError, match=r"store .* is damaged: delete .*'client-5' has the label 100"):
        list(data.test_dataloader()[0])


def test_clients_that_do_not_report_back_are_counted(tmp_path):
    _, figures = fit(arrays(tmp_path, dropout=0.5, deadline=100), rounds=3)
    assert figures["train/dropped_clients"] + figures["train/clients"] == GOOD
    assert 0 < figures["train/dropped_clients"] < GOOD
    assert figures["train/late_clients"] == 0


def test_a_round_without_any_client_changes_nothing(tmp_path):
    with pytest.warns(EmptyRoundWarning, match="2 of 2 rounds had no client to train"):
        model, figures = fit(arrays(tmp_path, deadline=1))
    torch.manual_seed(0)
    assert torch.equal(weights(model), torch.cat([p.detach().reshape(-1) for p in MLP(4, 3, (5,)).parameters()]))
    assert (figures["train/late_clients"], figures["train/clients"]) == (GOOD, 0)


class Logged(Logger):
    """What is logged, by step."""

    name, version = "logged", 0

    def __init__(self):
        super().__init__()
        self.rows = []

    def log_metrics(self, metrics, step=None):
        self.rows.append((step, dict(metrics)))

    def log_hyperparams(self, *args, **kwargs):
        """Nothing."""


class EmptyRounds:
    """Of a sampler's availability: in some rounds everyone is late."""

    def __init__(self, rounds):
        self.rounds = rounds
        self.all_arrive = False

    def arrivals(self, seed, round_, clients, sizes):
        deadline = 1 if round_ in self.rounds else None
        return Availability(deadline=deadline).arrivals(seed, round_, clients, sizes)


@pytest.mark.parametrize("empty", [(0,), (1,), (0, 1, 2)])
def test_a_round_without_any_client_has_no_loss(tmp_path, empty):
    """None that a callback could choose, nor that of the round before; and a warning, with their number at the end."""
    data, logger, monitored = arrays(tmp_path), Logged(), []
    data.availability = EmptyRounds(empty)

    class Monitor(lightning.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            monitored.append(float(trainer.callback_metrics.get("train/global_loss", float("inf"))))

    model = FederatedModule(MLP(4, 3, (5,)), FedAvg(), FederatedLoop(1, None, 3))
    trainer = lightning.Trainer(
        max_epochs=3, accelerator="cpu", devices=1, logger=logger, enable_checkpointing=False, callbacks=[Monitor()],
        enable_progress_bar=False, enable_model_summary=False, inference_mode=False, use_distributed_sampler=False,
        limit_val_batches=0,
    )  # fmt: skip
    with pytest.warns(EmptyRoundWarning) as warned:
        trainer.fit(model, datamodule=data)
    said = [str(w.message) for w in warned if w.category is EmptyRoundWarning]
    assert said[0].startswith(f"round {empty[0]}: none of the clients has been trained (late: {GOOD})")
    assert said[1:] == [f"{len(empty)} of 3 rounds had no client to train."]
    rows = {step: row for step, row in logger.rows if "train/clients" in row}
    assert rows.keys() == {1, 2, 3}
    for round_ in range(3):
        row = rows[round_ + 1]
        assert ("train/global_loss" in row) == ("train/padding" in row) == (round_ not in empty)
        assert row["train/clients"] == (0 if round_ in empty else GOOD)
        assert ("train/global_loss" in trainer.logged_metrics) == (2 not in empty)
    assert min(monitored) > 0.5


def test_a_monitor_goes_on_over_a_round_without_any_client(tmp_path):
    """The best checkpoint is that of a round with clients, and stopping early counts on."""
    data = arrays(tmp_path)
    data.availability = EmptyRounds((1,))
    best = ModelCheckpoint(tmp_path / "best", monitor="train/global_loss", mode="min", filename="{epoch}")
    stop = EarlyStopping("train/global_loss", patience=3)
    trainer = lightning.Trainer(
        max_epochs=4, accelerator="cpu", devices=1, logger=False, callbacks=[best, stop],
        enable_progress_bar=False, enable_model_summary=False, inference_mode=False, use_distributed_sampler=False,
        limit_val_batches=0,
    )  # fmt: skip
    loop = FederatedLoop(1, None, 3, lambda p: torch.optim.SGD(p, lr=0.01))
    model = FederatedModule(MLP(4, 3, (5,)), FedAvg(), loop)
    with pytest.warns(EmptyRoundWarning):
        trainer.fit(model, datamodule=data)
    assert trainer.current_epoch == 4
    assert float(best.best_model_score) > 0.5
    assert "epoch=1" not in best.best_model_path


def test_a_rejected_attacker_does_not_count(tmp_path, asked):
    """All attack, and one of them diverges."""
    _, metrics = fit(arrays(tmp_path, bad=1), attack=Attack(1.0))
    assert metrics["train/attackers"] == GOOD
    assert metrics["train/attackers_weight"] == 1
