"""The LightningModule: rounds, the server's step, resuming, processes and workers."""

import copy
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import lightning
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from torch import nn

from flow_pl import FederatedLoop, FederatedModule
from flow_pl.callbacks import GeneralizedAccuracy, PersonalizedAccuracy
from flow_pl.checks import check_fit
from flow_pl.data import ArrayData, SyntheticData
from flow_pl.engine.server_round import server_groups
from flow_pl.errors import ConfigurationError, FlowError
from flow_pl.methods import FedAvg, FineTuning, Flow, Local, Minibatch, Phase, Step
from flow_pl.models import MLP
from flow_pl.models.routers import InstanceRouter
from tests.support import delta, flat


def data(cache, **settings):
    settings = {"num_clients": 12, "num_features": 8, "num_classes": 3, "cohort_size": 6, "chunk_size": 3, **settings}
    sizes = {"mean_log_size": 2.0, "sigma_log_size": 0.6, "min_size": 6, "max_size": 40}
    return SyntheticData(cache_dir=str(cache), **{**sizes, **settings})


def flow(**settings):
    return Flow(router=lambda blocks: InstanceRouter(blocks, hidden=(6,)), **settings)


TRACED = {"trace_after": 3}
"""Settings of a module that traces its steps soon, which takes a second or two."""


def module(method=None, trace_after=50, weighting="examples", client_scheduler=None, **settings):
    torch.manual_seed(3)
    sgd = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
    loop = FederatedLoop(1, None, 5, sgd, weighting, client_scheduler, trace_after=trace_after)
    model = FederatedModule(MLP(8, 3, (6,)), flow() if method is None else method, loop, **settings)
    check_fit(model.method, torch.zeros(1, 8), num_classes=3)
    return model


def trainer(rounds=2, **settings):
    settings = {"logger": False, "enable_checkpointing": False, "callbacks": [], **settings}
    settings["callbacks"] = [GeneralizedAccuracy(), PersonalizedAccuracy(), *settings["callbacks"]]
    return lightning.Trainer(
        max_epochs=rounds, accelerator="cpu", devices=1, inference_mode=False, use_distributed_sampler=False,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0, **settings,
    )  # fmt: skip


def fitted(tmp_path, method=None, rounds=2, trainer_settings=None, module_settings=None, **data_settings):
    lightning.seed_everything(0, verbose=False)
    model, run = module(method, **(module_settings or {})), trainer(rounds, **(trainer_settings or {}))
    run.fit(model, datamodule=data(tmp_path / "cache", **data_settings))
    return model, run


def parameters(model):
    return torch.cat([p.detach().reshape(-1) for p in model.server.parameters()])


def test_one_round_of_fedavg_is_the_weighted_mean_of_clients(tmp_path):
    """SGD with lr 1 sets w_g to sum_m n_m w_m / sum_m n_m, and global_step counts rounds."""
    model, run = fitted(tmp_path, FedAvg(), rounds=1)
    lightning.seed_everything(0, verbose=False)
    fresh = module(FedAvg())
    loader = run.datamodule.train_dataloader()
    loader.sampler.set_epoch(0)
    total, weight = 0.0, 0.0
    for batch in loader:
        batch = run.datamodule.on_after_batch_transfer(batch, 0)
        update = fresh.loop.train_clients(fresh.method, server_groups(fresh.method), batch)
        total, weight = total + flat(delta(update)["global"]), weight + update.weights["global"].sum()
    torch.testing.assert_close(parameters(model), parameters(fresh) + total / weight, atol=1e-6, rtol=1e-5)
    assert run.global_step == 1
    assert run.callback_metrics["train/clients"] == 6
    assert run.callback_metrics["step"] == 1


@pytest.mark.parametrize("server", ["momentum", "adam", "schedule"])
def test_server_optimizers_and_schedulers_take_the_pseudo_gradient(tmp_path, server):
    """FedAvgM and FedAdam by class, against the same optimizer stepped by hand on recorded pseudo-gradients."""
    makers = {
        "momentum": lambda p: torch.optim.SGD(p, lr=0.5, momentum=0.9),
        "adam": lambda p: torch.optim.Adam(p, lr=0.01, eps=1e-3),
        "schedule": lambda p: torch.optim.SGD(p, lr=1.0),
    }
    recorded = []

    class Record(Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            recorded.append([p.grad.clone() for p in pl_module.server.parameters()])

    settings = {"server_optimizer": makers[server]}
    if server == "schedule":
        settings["server_scheduler"] = lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    start = module(FedAvg(), **settings)
    lightning.seed_everything(0, verbose=False)
    model = copy.deepcopy(start)
    trainer(3, callbacks=[Record()]).fit(model, datamodule=data(tmp_path))
    by_hand = makers[server](list(start.server.parameters()))
    for number, grads in enumerate(recorded):
        if server == "schedule":
            by_hand.param_groups[0]["lr"] = 0.5**number
        for p, g in zip(start.server.parameters(), grads, strict=True):
            p.grad = g
        by_hand.step()
    torch.testing.assert_close(parameters(model), parameters(start), atol=1e-7, rtol=1e-6)


@pytest.fixture(scope="module")
def traced_run(tmp_path_factory):
    """A model and its finished trainer."""
    return fitted(tmp_path_factory.mktemp("traced"), flow(), module_settings=TRACED)


@pytest.mark.parametrize(
    ("change", "settings"),
    [
        ({"chunk_size": 1}, TRACED),
        pytest.param({"chunk_size": 6}, TRACED, marks=pytest.mark.slow),
        ({"chunk_size": "auto"}, {}),
        ({"num_workers": 2}, {}),
    ],
    ids=str,
)
def test_chunks_and_workers_change_nothing(tmp_path, traced_run, change, settings):
    """The router's dropout and tracing included; 0 and 2 workers and any chunk size give the same model."""
    reference, run = traced_run
    other, other_run = fitted(tmp_path, flow(), module_settings=settings, **change)
    torch.testing.assert_close(parameters(other), parameters(reference), atol=1e-5, rtol=1e-4)
    for name in ("val/generalized_accuracy", "val/personalized_accuracy"):
        assert other_run.callback_metrics[name] == run.callback_metrics[name]


class _KilledError(Exception):
    pass


class _KillAt(Callback):
    """Stops a run in the middle of a round, as a signal would: nothing is saved on the way out."""

    def __init__(self, batch: int) -> None:
        self.batch = batch
        self.seen = 0

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.seen += 1
        if self.seen > self.batch:
            raise _KilledError


@pytest.mark.parametrize(
    ("method", "tracing"),
    [
        (flow, {}),
        pytest.param(flow, TRACED, marks=pytest.mark.slow),
        pytest.param(lambda: FineTuning(), TRACED, marks=pytest.mark.slow),
    ],
    ids=["flow", "flow, traced", "fine_tuning"],
)
def test_a_killed_run_resumes_bit_identical(tmp_path, method, tracing):
    """Killed in round 3 of 4 and resumed from the last checkpoint; server momentum, schedules and router dropout on."""
    settings = {
        **tracing,
        "client_scheduler": lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5),
        "server_optimizer": lambda p: torch.optim.SGD(p, lr=0.7, momentum=0.5),
        "server_scheduler": lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.9),
    }
    whole, _ = fitted(tmp_path, method(), rounds=4, module_settings=settings)

    checkpoint = ModelCheckpoint(tmp_path / "ckpt", save_last=True)
    interrupted = {"callbacks": [checkpoint, _KillAt(batch=5)], "enable_checkpointing": True}
    with pytest.raises(_KilledError):
        fitted(tmp_path, method(), rounds=4, module_settings=settings, trainer_settings=interrupted)

    lightning.seed_everything(0, verbose=False)
    torch.rand(17)  # a resumed process has drawn other numbers
    resumed, run = module(method(), **settings), trainer(4)
    run.fit(resumed, datamodule=data(tmp_path / "cache"), ckpt_path=str(tmp_path / "ckpt" / "last.ckpt"))
    assert run.global_step == 4
    assert torch.equal(parameters(resumed), parameters(whole))


@pytest.mark.parametrize("population", [pytest.param(12, marks=pytest.mark.slow), 60])
def test_flow_keeps_nothing_per_client(tmp_path, population):
    """The checkpoint holds the server's groups and nothing that grows with the population."""
    checkpoint = ModelCheckpoint(tmp_path / "ckpt", save_last=True)
    model, _ = fitted(
        tmp_path, rounds=1, num_clients=population,
        trainer_settings={"callbacks": [checkpoint], "enable_checkpointing": True},
    )  # fmt: skip
    saved = torch.load(tmp_path / "ckpt" / "last.ckpt", weights_only=True)
    numbers = sum(t.numel() for t in saved["state_dict"].values())
    # backbone 8-6-3, router 8-6 with two exits, loss scale and its counter
    assert numbers == (8 * 6 + 6 + 6 * 3 + 3) + (8 * 6 + 6 + 2 * (6 * 2 + 2)) + 2
    assert set(model.method.shared) == {"global", "router"}


def test_local_never_moves_the_server(tmp_path):
    start = parameters(module(Local(1)))
    model, run = fitted(tmp_path, Local(1), rounds=2, trainer_settings={"check_val_every_n_epoch": 2})
    assert torch.equal(parameters(model), start)
    assert run.global_step == 1, "a second round changes nothing"
    assert "val/personalized_accuracy" in run.callback_metrics


def test_validation_sees_the_round_it_follows(tmp_path):
    """Validation after round r evaluates the model that round r made: the last one equals a validation afterwards."""
    model, run = fitted(tmp_path, FedAvg())
    last = float(run.callback_metrics["val/generalized_loss"])
    again = trainer().validate(model, datamodule=data(tmp_path / "cache"), verbose=False)[0]
    assert again["val/generalized_loss"] == pytest.approx(last, rel=1e-6)


@pytest.mark.parametrize("precision", ["bf16-mixed", pytest.param("16-mixed", marks=pytest.mark.slow)])
def test_mixed_precision_trains_like_float32(tmp_path, precision):
    """Weights stay float32, and the scaler's factor is not taken off a pseudo-gradient that never had it."""
    dtype = "bf16-mixed" if precision == "bf16-mixed" else "16-mixed"
    scaler = torch.amp.GradScaler("cpu") if precision == "16-mixed" else None
    plugin = MixedPrecision(dtype, device="cpu", scaler=scaler)
    full, _ = fitted(tmp_path, rounds=3)
    mixed, run = fitted(tmp_path, rounds=3, trainer_settings={"plugins": [plugin]})
    assert all(p.dtype == torch.float32 for p in mixed.server.parameters())
    step = (parameters(full) - parameters(module())).norm()
    assert (parameters(mixed) - parameters(full)).norm() < 0.25 * step
    if scaler is not None:
        assert run.callback_metrics["train/skipped_steps"] == 0
        # 2^16 may be too much for the first gradients, as it is for GradScaler: then it was halved
        assert float(mixed.loss_scale.value) >= 2.0**14


def test_local_has_nothing_to_unscale(tmp_path):
    plugin = MixedPrecision("16-mixed", device="cpu", scaler=torch.amp.GradScaler("cpu"))
    start = parameters(module(Local(1)))
    model, run = fitted(tmp_path, Local(1), trainer_settings={"plugins": [plugin]})
    assert torch.equal(parameters(model), start)
    assert run.global_step == 1


@pytest.mark.parametrize("precision", ["64-true", "bf16-true"])
def test_other_precisions_are_refused(tmp_path, precision):
    with pytest.raises(ConfigurationError, match=f"trainer.precision is {precision}, expected one of 32-true"):
        fitted(tmp_path, FedAvg(), trainer_settings={"precision": precision})


def test_the_clients_learning_rate_of_a_round_is_logged(tmp_path):
    settings = {"client_scheduler": lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)}
    _, run = fitted(tmp_path, FedAvg(), 3, module_settings=settings)
    assert run.callback_metrics["train/client_lr_factor"] == 0.25
    assert "train/client_lr_factor" not in fitted(tmp_path, FedAvg(), 1)[1].callback_metrics


@pytest.mark.parametrize("setting", ["server_scheduler", "client_scheduler"])
def test_a_scheduler_that_wants_a_metric_is_refused(tmp_path, setting):
    settings = {setting: torch.optim.lr_scheduler.ReduceLROnPlateau}
    with pytest.raises(ConfigurationError, match="ReduceLROnPlateau"):
        fitted(tmp_path, FedAvg(), module_settings=settings)


def test_an_interrupted_round_leaves_nothing_behind(tmp_path):
    """Interrupted after one of two chunks, then fitted anew: as if it had not begun."""
    reference, _ = fitted(tmp_path, FedAvg(), rounds=1)
    lightning.seed_everything(0, verbose=False)
    model = module(FedAvg())
    with pytest.raises(_KilledError):
        trainer(1, callbacks=[_KillAt(batch=1)]).fit(model, datamodule=data(tmp_path / "cache"))
    trainer(1).fit(model, datamodule=data(tmp_path / "cache"))
    assert torch.equal(parameters(model), parameters(reference))


def test_diverging_clients_stop_the_run(tmp_path):
    lightning.seed_everything(0, verbose=False)
    model = module(FedAvg())
    model.loop.client_optimizer = lambda p: torch.optim.SGD(p, lr=1e30)
    message = r"round 0: the updates of [56] of 6 clients are not finite.*lower the learning"
    with pytest.raises(FlowError, match=message):
        trainer(3).fit(model, datamodule=data(tmp_path))


@pytest.mark.parametrize(
    ("backbone", "message"),
    [
        (MLP(9, 3, (6,)), r"features have shape \[8\].*which MLP cannot take"),
        (MLP(8, 2, (6,)), "labels run from 0 to 2 but the backbone has 2 outputs"),
        (nn.Sequential(nn.Unflatten(1, (1, 8)), nn.Conv1d(1, 3, 3)), r"shape \[1, 3, 6\], classification expects"),
    ],
)
def test_data_that_does_not_fit_the_backbone_is_refused_before_training(tmp_path, backbone, message):
    with pytest.raises(FlowError, match=message):
        trainer().fit(FederatedModule(backbone, FedAvg()), datamodule=data(tmp_path))


def test_checkpoints_of_another_method_or_backbone_are_refused(tmp_path):
    checkpoint = ModelCheckpoint(tmp_path / "ckpt", save_last=True)
    fitted(tmp_path, rounds=1, trainer_settings={"callbacks": [checkpoint], "enable_checkpointing": True})
    path = str(tmp_path / "ckpt" / "last.ckpt")
    for other, message in (
        (module(FedAvg()), "written by the method Flow, this configuration has FedAvg"),
        (FederatedModule(nn.Sequential(nn.Linear(8, 3)), flow()), "written by the backbone MLP, .* has Sequential"),
        (FederatedModule(MLP(8, 3, (7,)), flow()), r"different parameters .*\[6, 8\] instead of \[7, 8\]"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            trainer().test(other, datamodule=data(tmp_path / "cache"), ckpt_path=path)


def test_bare_loaders_are_refused(tmp_path):
    source = data(tmp_path)
    source.prepare_data()
    source.setup()
    with pytest.raises(ConfigurationError, match="NoneType, expected a FederatedDataModule"):
        trainer().fit(module(), source.train_dataloader())


SCRIPT = """
import sys, torch, lightning
from pathlib import Path
from tests.test_module import TRACED, data, module, trainer
cache, out, cohort, processes = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
lightning.seed_everything(0, verbose=False)
model = module(**TRACED)
run = trainer(2)
run = lightning.Trainer(max_epochs=2, accelerator="cpu", devices=processes, strategy="ddp", inference_mode=False,
    logger=False, enable_checkpointing=False, use_distributed_sampler=False, enable_progress_bar=False,
    enable_model_summary=False, num_sanity_val_steps=0, callbacks=run.callbacks[:2])
run.fit(model, datamodule=data(cache, cohort_size=cohort))
if run.is_global_zero:
    metrics = {k: float(v) for k, v in run.callback_metrics.items()}
    torch.save((torch.cat([p.detach().reshape(-1) for p in model.server.parameters()]), metrics), out)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "cohort"),
    [
        pytest.param(2, 1, marks=pytest.mark.extended),
        (2, 5),
        (3, 2),
        pytest.param(3, 7, marks=pytest.mark.extended),
    ],
)
def test_several_processes_give_the_numbers_of_one(tmp_path, processes, cohort):
    """gloo on CPU, the router's dropout included; an uneven cohort, and one with fewer clients than processes."""
    alone, run = fitted(tmp_path, module_settings=TRACED, cohort_size=cohort)
    script, out = tmp_path / "run.py", tmp_path / "out.pt"
    script.write_text(SCRIPT)
    root = Path(__file__).resolve().parents[1]
    env = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(script), str(tmp_path / "cache"), str(out), str(cohort), str(processes)]
    done = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    together, metrics = torch.load(out)
    torch.testing.assert_close(together, parameters(alone), atol=1e-5, rtol=1e-4)
    for name in ("train/clients", "train/examples", "val/generalized_accuracy", "val/personalized_accuracy"):
        assert metrics[name] == pytest.approx(float(run.callback_metrics[name]), abs=1e-6)


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_a_trainer_that_forbids_gradients_is_refused(tmp_path, stage):
    """Before anything is evaluated; where no step is taken, it is none of our business."""
    settings = {"accelerator": "cpu", "devices": 1, "logger": False, "enable_progress_bar": False}
    run = getattr(lightning.Trainer(**settings, enable_model_summary=False), stage)
    with pytest.raises(ConfigurationError, match=r"FineTuning personalizes .* Trainer\(inference_mode=False\)"):
        run(module(FineTuning()), datamodule=data(tmp_path / "cache"))
    run(module(FedAvg()), datamodule=data(tmp_path / "cache"))


class _Views(nn.Module):
    def forward(self, x):
        return x.view(len(x), -1)


def test_a_backbone_that_needs_another_layout_is_refused_before_training(tmp_path):
    """It flattens by `view`, which images with their channels last do not allow."""
    x = np.random.default_rng(0).normal(size=(40, 16)).astype(np.float32)
    np.savez(tmp_path / "images.npz", x=x, y=np.arange(40) % 2, client=np.repeat(["a", "b", "c", "d"], 10))
    path, cache = str(tmp_path / "images.npz"), str(tmp_path / "cache")
    source = ArrayData(path, feature_shape=(1, 4, 4), num_classes=2, cohort_size=2, chunk_size=1, cache_dir=cache)
    backbone = nn.Sequential(nn.Conv2d(1, 3, 2), _Views(), nn.Linear(27, 2))
    with pytest.raises(ConfigurationError, match="view size is not compatible"):
        trainer().fit(FederatedModule(backbone, FedAvg(), FederatedLoop(channels_last=True)), datamodule=source)
    trainer(1).fit(FederatedModule(backbone, FedAvg()), datamodule=source)


class OfShare(FedAvg):
    """Multiplies the loss by the share of a cohort, which it reads when its phases are created."""

    def training(self):
        share = self.cohort_share
        return (
            Phase("all", (Step("global", lambda groups, minibatch: share * self.loss(minibatch, groups["global"])),)),
        )


def test_phases_follow_the_share_of_a_cohort(tmp_path):
    """Two fits of one module, whose steps are traced, with all and then half of the clients in a cohort."""
    model = module(OfShare(), **TRACED)
    losses = []
    for clients in (12, 6):
        run = trainer(1)
        run.fit(model, datamodule=data(tmp_path / "cache", cohort_size=clients, new_client_fraction=0.0, seed=0))
        assert model.method.cohort_share == clients / 12
        (step,) = model.method.phases[0].steps
        (plain,) = FedAvg.training(model.method)[0].steps
        groups = server_groups(model.method)
        batch = Minibatch(torch.ones(2, 8), torch.tensor([0, 1]), torch.ones(2, dtype=torch.bool))
        losses.append(step.objective(groups, batch) / plain.objective(groups, batch))
    torch.testing.assert_close(torch.stack(losses), torch.tensor([1.0, 0.5]))
