"""Settings of the trainer through the real command: an ordinary run, or one line before anything is trained."""

import importlib.util
import re
import subprocess
import sys

import pytest
import torch

from flow_pl.cli import run
from tests.test_cli import config, fails  # noqa: F401 (a fixture)

REFUSED = {
    "overfit_batches=1": "trainer.overfit_batches is 1, expected 0",
    "overfit_batches=0.5": "trainer.overfit_batches is 0.5, expected 0",
    "check_val_every_n_epoch=0": "trainer.check_val_every_n_epoch is 0, expected a whole number of 1 or more",
    "check_val_every_n_epoch=-1": "trainer.check_val_every_n_epoch is -1",
    "val_check_interval=0": "trainer.val_check_interval is 0",
    "val_check_interval=0.5": "trainer.val_check_interval is 0.5, expected 1.0, the end of a round",
    "val_check_interval=1": "trainer.val_check_interval is 1, expected 1.0",
    "val_check_interval=5": "trainer.val_check_interval is 5, expected 1.0",
    "num_sanity_val_steps=-3": "trainer.num_sanity_val_steps is -3, expected a whole number of -1 or more",
    "log_every_n_steps=-1": "trainer.log_every_n_steps is -1",
    "num_nodes=0": "trainer.num_nodes is 0",
    "devices=-1": "trainer.devices is -1, expected the number of processes or auto.",
    "devices=0": "trainer.devices is 0, expected",
    "devices=-3": "trainer.devices is -3, expected",
    "devices=two": "trainer.devices is two, expected",
    "devices=1.5": "trainer.devices is 1.5, expected",
    "devices=[]": "trainer.devices is [], expected",
    "devices=None": "trainer.devices is null, expected",
    "strategy=nonsense": "trainer.strategy is nonsense, expected one of auto, ddp, ",
    "strategy=ddp_forks": "Did you mean ddp_fork?",
    "strategy=DDPStrategi": "trainer.strategy is DDPStrategi, expected one of auto, ",
    "strategy=DDPStrategy": "trainer.strategy is DDPStrategy, which is a class: expected {class_path: DDPStrategy}",
    "strategy=single_device": "trainer.strategy is single_device, expected one of auto, ",
    "barebones=true,logger=true": "`Trainer(barebones=True, logger=True)` was passed",
    "barebones=true,logger=CSVLogger,logger.save_dir=x": "`Trainer(barebones=True, logger=",
    "barebones=true,enable_progress_bar=true": "`Trainer(barebones=True, enable_progress_bar=True)` was passed",
    "barebones=true,enable_checkpointing=true": "`Trainer(barebones=True, enable_checkpointing=True)` was passed",
    "barebones=true,profiler=simple": "`Trainer(barebones=True, profiler='simple')` was passed",
    "callbacks+=SpikeDetection": "has SpikeDetection, which needs the loss of every batch",
    "strategy=ddp_spawn": "trainer.strategy is ddp_spawn, which spawns fresh processes for the run",
    "strategy=fsdp": "trainer.strategy is fsdp, expected ddp, auto",
    "accelerator=nonsense": "invalid accelerator name",
    "accelerator=tpu": "a setting needs a package that is not installed: Requirement 'torch_xla",
    "precision=transformer-engine": "Requirement 'transformer_engine",
    "profiler=nonsense": "one of ['simple', 'advanced', 'pytorch', 'xla']",
    "max_epochs=-5": "`max_epochs` must be a non-negative integer or -1",
    "max_time=soon": "not a valid duration",
    "limit_train_batches=-1": "invalid value -1",
    "callbacks+=StochasticWeightAveraging,callbacks.swa_lrs=0.1": "has StochasticWeightAveraging, which",
    "callbacks+=LearningRateFinder": "has LearningRateFinder, which searches by automatic optimization",
    "callbacks+=BatchSizeFinder": "set data.chunk_size to auto",
    "callbacks+=BackboneFinetuning": "set requires_grad in the backbone",
    "logger=MLFlowLogger": "not installed",
}


ALIKE = (
    "overfit_batches=0.5", "check_val_every_n_epoch=-1", "val_check_interval=0", "val_check_interval=0.5",
    "val_check_interval=1", "devices=-1", "devices=-3", "devices=two", "devices=1.5", "devices=[]", "devices=None",
    "strategy=ddp_forks", "strategy=DDPStrategi", "strategy=single_device", "strategy=fsdp", "num_nodes=0",
    "barebones=true,logger=CSVLogger,logger.save_dir=x", "barebones=true,enable_progress_bar=true",
    "barebones=true,enable_checkpointing=true", "barebones=true,profiler=simple", "accelerator=tpu",
    "profiler=nonsense", "limit_train_batches=-1", "callbacks+=LearningRateFinder", "callbacks+=BatchSizeFinder",
    "logger=MLFlowLogger",
)  # fmt: skip
"""Refused by a check, or in a way, that another one of them meets."""


@pytest.mark.parametrize(
    "settings", [pytest.param(each, marks=pytest.mark.slow) if each in ALIKE else each for each in REFUSED]
)
def test_what_cannot_work_gets_one_line_before_training(config, tmp_path, capsys, settings):  # noqa: F811
    if "MLFlow" in settings and importlib.util.find_spec("mlflow"):
        pytest.skip("mlflow is installed")
    status, said = fails(capsys, "fit", "--config", config, *(f"--trainer.{each}" for each in settings.split(",")))
    assert status == 1
    assert REFUSED[settings] in said
    assert said.splitlines()[-1].startswith("error: ")
    assert "Traceback" not in said
    assert not (tmp_path / "run" / "checkpoints" / "last.ckpt").exists()


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_a_seed_out_of_range_is_refused(config, capsys, seed):  # noqa: F811
    status, said = fails(capsys, "fit", "--config", config, f"--seed_everything={seed}")
    assert (status, said) == (1, f"error: seed_everything is {seed}, expected a whole number from 0 to 4294967295.\n")


@pytest.mark.parametrize(
    "options",
    [
        ["callbacks+=Timer", "callbacks.duration=00:00:10:00"],
        pytest.param(
            ["callbacks+=Timer", "callbacks.duration=00:00:10:00", "callbacks.interval=epoch"], marks=pytest.mark.slow
        ),
        ["callbacks+=EMAWeightAveraging"],
        pytest.param(
            ["plugins=[{class_path: SLURMEnvironment, init_args: {requeue_signal: SIGHUP}}]"], marks=pytest.mark.slow
        ),
        ["check_val_every_n_epoch=null"],
        pytest.param(["max_time={minutes: 3}"], marks=pytest.mark.slow),
        ["barebones=true"],
        pytest.param(["strategy={class_path: SingleDeviceStrategy, init_args: {device: cpu}}"], marks=pytest.mark.slow),
    ],
    ids=lambda options: options[0].partition(",")[0],
)
def test_what_is_unusual_runs(config, options):  # noqa: F811
    cli = run(["fit", "--config", str(config), *(f"--trainer.{option}" for option in options)])
    assert cli.trainer.global_step == 2
    if options == ["barebones=true"]:
        assert not cli.trainer.loggers
        assert not cli.trainer.checkpoint_callbacks


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp_fork", pytest.param("ddp_notebook", marks=pytest.mark.extended)])
def test_forked_processes_end_with_the_weights_of_one(config, tmp_path, strategy):  # noqa: F811
    """In a process of its own, since a forked run wants no threads of before: as many rounds, the same weights."""
    command = [sys.executable, "-m", "flow_pl", "fit", "--config", str(config)]
    forked = [f"--trainer.strategy={strategy}", "--trainer.devices=2", f"--trainer.default_root_dir={tmp_path / 'two'}"]
    done = subprocess.run([*command, *forked], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "clients 3/3" in done.stdout
    run(["fit", "--config", str(config)])
    found = [torch.load(tmp_path / name / "checkpoints" / "last.ckpt", weights_only=True) for name in ("two", "run")]
    for key, value in found[1]["state_dict"].items():
        torch.testing.assert_close(found[0]["state_dict"][key], value, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_a_fit_does_not_go_on_from_weights_alone(config, tmp_path, capsys):  # noqa: F811
    """A test can be made of them."""
    alone = ["--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.save_weights_only=true"]
    alone += [f"--trainer.callbacks.dirpath={tmp_path / 'weights'}", "--trainer.callbacks.filename=w"]
    run(["fit", "--config", str(config), *alone])
    (path,) = (tmp_path / "weights").glob("w*.ckpt")
    status, said = fails(capsys, "fit", "--config", config, "--ckpt_path", path)
    assert status == 1
    assert "error: the checkpoint holds only weights (save_weights_only)" in said
    run(["test", "--config", str(config), "--ckpt_path", str(path)])


@pytest.mark.parametrize("chunk", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_a_diverged_client_under_detect_anomaly_is_told_in_two_lines(config, capfd, chunk):  # noqa: F811
    """The operation and the line that asked for it, without the trace of the whole training."""
    rate = ["--model.loop.client_optimizer=torch.optim.SGD", "--model.loop.client_optimizer.lr=1e30"]
    options = [f"--data.chunk_size={chunk}", "--trainer.detect_anomaly=true", *rate]
    status, said = fails(capfd, "fit", "--config", config, *options)
    *before, operation, error = said.splitlines()
    assert status == 1
    assert error.startswith("error: the training of a client has diverged: Function")
    assert re.fullmatch(r"Error detected in \w+Backward\d? of .*flow_pl/[\w/]+\.py, line \d+: .+", operation)
    assert not any("Traceback" in line or line.startswith("  File") for line in before)


def test_a_package_that_a_callback_of_lightning_needs_is_named(config, monkeypatch, capsys):  # noqa: F811
    monkeypatch.setattr("lightning.pytorch.accelerators.cpu._PSUTIL_AVAILABLE", False)
    monkeypatch.setattr("lightning.pytorch.callbacks.device_stats_monitor._PSUTIL_AVAILABLE", False)
    status, said = fails(capsys, "fit", "--config", config, "--trainer.callbacks+=DeviceStatsMonitor")
    assert status == 1
    assert said.splitlines()[-1].startswith("error: `DeviceStatsMonitor` cannot log CPU stats as `psutil` is not")
