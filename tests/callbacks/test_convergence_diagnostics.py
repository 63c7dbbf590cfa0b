"""The quantities of the convergence analysis on a run: against plain loops, in two processes, and without a trace."""

import csv
import socket
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from flow_pl.callbacks import ConvergenceDiagnostics
from flow_pl.data import SyntheticData
from flow_pl.data.batch import Chunk
from flow_pl.engine.loop import FederatedLoop
from flow_pl.engine.server_round import server_groups
from flow_pl.errors import ConfigurationError
from flow_pl.methods import APFL, EvidenceFlow, FedAvg, FedRep, Flow, HypCluster, Local
from flow_pl.models import MLP
from flow_pl.models.routers import InstanceRouter
from flow_pl.module import FederatedModule
from tests.callbacks.fakes import make_trainer
from tests.support import flat

CLIENTS = 9


def flow(dropout=0.3, **settings):
    return Flow(router=partial(InstanceRouter, hidden=(4,), dropout=dropout), **settings)


def federation(folder, **settings):
    defaults = {"cohort_size": 4, "chunk_size": 3, "new_client_fraction": 0.0, "val_fraction": 0.0}
    data = SyntheticData(
        num_clients=CLIENTS,
        num_features=5,
        num_classes=3,
        mean_log_size=2.5,
        min_size=6,
        cache_dir=str(folder),
        seed=0,
        **(defaults | settings),
    )
    data.prepare_data()
    return data


def fit(method, folder, *callbacks, rounds=3, weighting="examples", data=None, epochs=2, **settings):
    torch.manual_seed(0)
    sgd = lambda p: torch.optim.SGD(p, lr=0.1)  # noqa: E731
    module = FederatedModule(MLP(5, 3, (6,)), method, FederatedLoop(epochs, None, 4, sgd, weighting))
    trainer = make_trainer(*callbacks, max_epochs=rounds, default_root_dir=folder, **settings)
    trainer.fit(module, datamodule=federation(folder) if data is None else data)
    return module, trainer


def diagnostics(**settings):
    return ConvergenceDiagnostics(**({"every_n_rounds": 2, "figure": None} | settings))


@pytest.mark.parametrize("weighting", ["examples", "uniform"])
def test_gradients_are_those_of_plain_loops_over_all_clients(tmp_path, weighting):
    """F = sum_m p_m f_m over every seen client: no correction, and the diversity is the weighted variance."""
    measured = diagnostics(every_n_rounds=1, clients=CLIENTS)
    data = federation(tmp_path)
    fit(FedAvg(), tmp_path, measured, rounds=1, weighting=weighting, data=data)
    torch.manual_seed(0)
    backbone = MLP(5, 3, (6,))  # as it was before the round
    seen = data.federation.seen
    batch = data.train_dataloader().dataset[Chunk(0, tuple(seen.tolist()))]
    losses, gradients = [], []
    for client, n in enumerate(batch.train.sizes):
        loss = F.cross_entropy(backbone(batch.train.x[client, :n].float()), batch.train.y[client, :n])
        gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(backbone.parameters()))]))
        losses.append(loss.detach())
    p = torch.tensor(batch.train.sizes).float() if weighting == "examples" else torch.ones(len(seen))
    p, g = p / p.sum(), torch.stack(gradients)
    mean = p @ g
    row = measured.rows[0]
    assert row["loss"] == pytest.approx(float(p @ torch.stack(losses)), rel=1e-5)
    assert row["gradient_norm"] == pytest.approx(float(mean.norm()), rel=1e-4)
    assert row["client_gradient_norm"] ** 2 == pytest.approx(float(p @ g.square().sum(1)), rel=1e-4)
    assert row["gradient_diversity"] == pytest.approx(float(p @ (g - mean).square().sum(1)), rel=1e-4)
    assert row["G"] ** 2 + row["B"] ** 2 * row["gradient_norm"] ** 2 >= row["client_gradient_norm"] ** 2 * (1 - 1e-6)


@pytest.mark.parametrize("method", [FedAvg(), EvidenceFlow()], ids=["FedAvg", "EvidenceFlow"])
def test_progress_of_one_client_is_the_length_of_the_servers_step(tmp_path, method):
    """With one client in a round, the server takes over the copy that this client sends."""
    measured = diagnostics(every_n_rounds=1)
    torch.manual_seed(0)
    before = flat(dict(MLP(5, 3, (6,)).named_parameters()))
    module, _ = fit(method, tmp_path, measured, rounds=1, data=federation(tmp_path, cohort_size=1))
    after = flat(server_groups(module.method)["global"])
    assert measured.rows[0]["global_progress"] == pytest.approx(float((after - before).norm()), rel=1e-5)
    # of evidence routing's model on the other folds
    assert ("local_progress" in measured.rows[0]) == isinstance(method, EvidenceFlow)


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(flow, id="none", marks=pytest.mark.slow),
        pytest.param(lambda: flow(split="parts"), id="parts", marks=pytest.mark.slow),
        pytest.param(lambda: flow(split="cross"), id="cross"),
        pytest.param(lambda: flow(route_by="client"), id="by client", marks=pytest.mark.slow),
        pytest.param(lambda: flow(routing="hard"), id="hard", marks=pytest.mark.slow),
        pytest.param(APFL, id="APFL"),
        pytest.param(FedRep, id="FedRep", marks=pytest.mark.slow),
    ],
)
def test_training_is_the_same_bit_for_bit(tmp_path, make):
    """Dropout in the router and what clients keep included; and the module has its own loop again."""
    plain, _ = fit(make(), tmp_path / "plain", rounds=2)
    measured = diagnostics(every_n_rounds=1)
    observed, trainer = fit(make(), tmp_path / "observed", measured, rounds=2)
    for name, group in server_groups(plain.method).items():
        assert torch.equal(flat(group), flat(server_groups(observed.method)[name]))
    assert type(observed.loop) is FederatedLoop
    row = measured.rows[-1]
    assert row["local_progress"] > 0
    assert float(trainer.callback_metrics["diagnostics/local_progress"]) == pytest.approx(row["local_progress"])
    if isinstance(observed.method, Flow):
        assert 0 < row["deviation"] < row["local_progress"]
        assert row["q_local"] + row["q_global"] == pytest.approx(1)
        assert row["q_local"] == pytest.approx((row["q_local/linear1"] + row["q_local/head"]) / 2)
    else:
        assert "q_local" not in row


@pytest.mark.parametrize("method", [Local(1), HypCluster()], ids=["Local", "HypCluster"])
def test_without_a_global_model_nothing_is_measured(tmp_path, method):
    measured = diagnostics()
    _, trainer = fit(method, tmp_path, measured, rounds=1)
    assert not measured.rows
    assert not [name for name in trainer.callback_metrics if name.startswith("diagnostics/")]


@pytest.mark.slow
def test_rounds_table_figure_and_resumed_fit(tmp_path):
    settings = {"figure": "figures/diagnostics.png", "every_n_rounds": 2}
    data = federation(tmp_path)
    _, trainer = fit(flow(), tmp_path, diagnostics(**settings), rounds=3, data=data, enable_checkpointing=True)
    resumed = diagnostics(**settings)
    again = make_trainer(resumed, max_epochs=5, default_root_dir=tmp_path)
    torch.manual_seed(0)
    module = FederatedModule(MLP(5, 3, (6,)), flow(), FederatedLoop(2, None, 4))
    again.fit(module, datamodule=data, ckpt_path=trainer.checkpoint_callback.best_model_path, weights_only=False)
    rows = list(csv.DictReader((tmp_path / "diagnostics.csv").open()))
    assert [row["round"] for row in rows] == ["0", "2", "4"]
    assert [row["round"] for row in resumed.rows] == [0, 2, 4]
    assert (tmp_path / "figures" / "diagnostics.png").read_bytes().startswith(b"\x89PNG")


def test_settings_that_cannot_work_are_refused(tmp_path):
    with pytest.raises(ConfigurationError, match="every_n_rounds is 0"):
        ConvergenceDiagnostics(every_n_rounds=0)
    with pytest.raises(ConfigurationError, match=r"expected a name that ends in \.png"):
        ConvergenceDiagnostics(figure="diagnostics.pdf")
    (tmp_path / "file").touch()
    with pytest.raises(ConfigurationError, match="cannot be written"):
        fit(FedAvg(), tmp_path, diagnostics(path="file/diagnostics.csv"))


def run(folder, **settings):
    measured = diagnostics(every_n_rounds=1, clients=5)
    fit(flow(), folder, measured, rounds=2, **settings)
    return measured.rows


def _run_as(rank: int, folder: Path, port: int):
    environment = {"LOCAL_RANK": rank, "WORLD_SIZE": 2, "NODE_RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, str(value))
        rows = run(folder, strategy="ddp", devices=2)
        torch.distributed.destroy_process_group()
    return rows


def _second_process(_: int, folder: Path, port: int) -> None:
    torch.save(_run_as(1, folder, port), folder / "second.pt")


@pytest.mark.slow
def test_two_processes_measure_what_one_does(tmp_path):
    """The drawn clients are shared by the processes, as are those of the round."""
    expected = run(tmp_path)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    child = torch.multiprocessing.spawn(_second_process, args=(tmp_path, port), join=False)
    first = _run_as(0, tmp_path, port)
    child.join()
    second = torch.load(tmp_path / "second.pt")
    assert first == second
    for row, one in zip(first, expected, strict=True):
        assert row == pytest.approx(one, rel=1e-3, abs=1e-6)
