"""What a run writes for Weights & Biases, read back from the files that `wandb sync` uploads."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
import wandb
import yaml
from lightning.pytorch.loggers import WandbLogger

import flow_pl.callbacks
from flow_pl.callbacks import RoundProgressBar
from flow_pl.callbacks.wandb_run import SLACK, WandbRun, continued_run
from flow_pl.cli import run
from flow_pl.loggers import make_wandb_logger
from flow_pl.shipped import find
from tests.test_cli import TINY
from tests.wandb_files import offline_runs


@pytest.fixture
def command(tmp_path, monkeypatch):
    """Runs a subcommand of a tiny configuration that logs to W&B offline; each is a session of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WANDB_RUN_ID", raising=False)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    config = tmp_path / "tiny.yaml"
    config.write_text(TINY.format(root=tmp_path))

    def call(subcommand, *options, run=run, logger="WandbLogger"):
        # a whole path: the first test of the process starts W&B's own process, in its own folder
        to = [f"--trainer.logger.save_dir={tmp_path}", "--trainer.logger.offline=true"] if logger else []
        try:
            return run(
                [subcommand, "--config", str(config), f"--trainer.logger={logger or 'true'}", *to, *map(str, options)]
            )
        finally:
            wandb.finish()

    return call


def test_config_rounds_table_and_images(command, tmp_path):
    """A fit and the test of its best checkpoint, in a second process as far as W&B can tell."""
    image = pytest.importorskip("PIL.Image", reason="W&B takes images with Pillow")
    cli = command("fit", "--trainer.logger.project=tiny")
    figures = tmp_path / "run" / "figures"
    figures.mkdir()
    image.new("RGB", (5, 4)).save(figures / "clients.png")
    best = tmp_path / "run" / "checkpoints" / "best.ckpt"
    tested = command("test", "--ckpt_path", best)
    fit, test = offline_runs(tmp_path)

    assert fit.project == "tiny"
    assert fit.config["seed_everything"] == 1
    assert fit.config["trainer"]["max_epochs"] == 2
    assert fit.config["data"]["init_args"]["cohort_size"] == 3
    assert fit.config["model"]["method"]["init_args"]["router_lr_scale"] == 1.0
    assert fit.config["model"]["server_optimizer"]["init_args"]["lr"] == 1.0
    assert "__path__" not in json.dumps(fit.config)

    for metric in ("train/global_loss", "val/personalized_accuracy"):
        assert [row["trainer/global_step"] for row in fit.rows(metric)] == [1, 2], "one row a round, at the round"
    last = float(cli.trainer.callback_metrics["val/personalized_accuracy"])
    assert fit.rows("val/personalized_accuracy")[-1]["val/personalized_accuracy"] == pytest.approx(last)

    rounds = torch.load(best, weights_only=False)["global_step"]
    metrics = {name: float(value) for name, value in tested.trainer.callback_metrics.items()}
    (row,) = test.rows("test/seen/personalized_accuracy")
    assert row["trainer/global_step"] == rounds
    assert row["test/seen/personalized_accuracy"] == pytest.approx(metrics["test/seen/personalized_accuracy"])

    (logged,) = test.rows("test/results/path")
    assert logged["trainer/global_step"] == rounds
    path = logged["test/results/path"]
    table = json.loads((test.folder / "files" / path).read_text())
    assert table["columns"] == ["metric", "seen", "new"]
    values = {name: figures for name, *figures in table["data"]}
    for name in ("generalized_accuracy", "personalized_accuracy", "routed_local/head"):
        expected = [metrics[f"test/{population}/{name}"] for population in ("seen", "new")]
        assert values[name] == pytest.approx(expected)

    (logged,) = test.rows("figures/clients/filenames")
    (written,) = logged["figures/clients/filenames"]
    assert image.open(test.folder / "files" / written).size == (5, 4)
    assert {test.folder / "files" / name for name in (written, path)} < set(test.files), "what wandb sync uploads"


@pytest.mark.slow
def test_a_resumed_run_and_its_test_go_on_with_the_same_run(command, tmp_path):
    """Steps of W&B never repeat, so that `wandb sync` can append.

    A checkpoint is written between the two rows of its round, so after 3 of 4 rows; the next ones follow SLACK later.
    """
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    logger = command("fit").trainer.logger
    assert logger._wandb_init["resume"] == "allow"
    command("fit", "--ckpt_path", last, "--trainer.max_epochs", "3")
    command("fit", "--ckpt_path", "last", "--trainer.max_epochs", "4")
    command("test", "--ckpt_path", last)
    runs = offline_runs(tmp_path)
    assert len({run.id for run in runs}) == 1
    assert [[row["trainer/global_step"] for row in run.rows("train/global_loss")] for run in runs] == [
        [1, 2],
        [3],
        [4],
        [],
    ]
    steps = [[row["_step"] for row in run.history] for run in runs]
    assert steps[:3] == [[0, 1, 2, 3], [3 + SLACK, 4 + SLACK], [4 + 2 * SLACK, 5 + 2 * SLACK]]
    assert steps[3][0] == 5 + 3 * SLACK


class KilledError(Exception):
    pass


@pytest.mark.slow
def test_a_run_that_was_killed_goes_on_behind_its_rows(command, tmp_path, monkeypatch):
    """Killed in its second round, when the checkpoint of round 1 has a row, and two more are logged."""

    def kill(self, trainer, pl_module):
        if trainer.current_epoch == 1:
            raise KilledError

    with monkeypatch.context() as patch:
        patch.setattr(RoundProgressBar, "on_train_epoch_end", kill)
        with pytest.raises(KilledError):
            command("fit")
    command("fit", "--ckpt_path", "last")
    killed, resumed = offline_runs(tmp_path)
    assert killed.id == resumed.id
    assert [row["_step"] for row in killed.history] == [0, 1, 2]
    assert [row["_step"] for row in resumed.history] == [1 + SLACK, 2 + SLACK]


def checkpoint(path, **saved):
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"flow_pl": {}, "state_dict": {}, "callbacks": {WandbRun.__qualname__: saved} if saved else {}}, path)


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("checkpoints/last.ckpt", "saved"),
        ("../run/checkpoints/last.ckpt", "saved"),
        ("last", "saved"),
        ("hpc", "preempted"),
        ("best", None),
        (None, None),
        ("../other/last.ckpt", None),
        ("registry:model", None),
    ],
)
def test_the_run_is_that_of_the_checkpoint(tmp_path, monkeypatch, path, expected):
    monkeypatch.delenv("WANDB_RUN_ID", raising=False)
    root = tmp_path / "run"
    checkpoint(root / "checkpoints" / "last.ckpt", id="saved", step=3)
    checkpoint(root / "hpc_ckpt_1.ckpt", id="preempted", step=3)
    checkpoint(tmp_path / "other" / "last.ckpt", id="other", step=3)
    monkeypatch.chdir(root)
    assert continued_run(root, path) == expected
    assert continued_run(Path(), path) == expected
    monkeypatch.setenv("WANDB_RUN_ID", "an agent's")
    assert continued_run(root, path) is None


def test_a_checkpoint_without_a_run_continues_none(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_RUN_ID", raising=False)
    checkpoint(tmp_path / "checkpoints" / "last.ckpt")
    assert continued_run(tmp_path, "last") is None


@pytest.mark.parametrize(
    ("given", "expected"), [({}, "noted"), ({"id": "given"}, "given"), ({"version": "given", "id": None}, "given")]
)
def test_a_logger_that_names_its_run_keeps_it(given, expected):
    logger = make_wandb_logger("noted", WandbLogger, resume=None, **given)
    assert (logger.version, logger._wandb_init["resume"]) == (expected, "allow")
    assert make_wandb_logger(None, WandbLogger, resume="must", **given)._wandb_init["resume"] == "must"


@pytest.mark.slow
def test_rounds_without_wandb_pass_its_run_on_and_a_new_fit_forgets_it(command, tmp_path):
    def run_id():
        return continued_run(tmp_path / "run", "last")

    quick = ["--trainer.max_epochs", "1"]
    logged = command("fit", *quick).trainer.logger.version
    command("fit", "--ckpt_path", "last", "--trainer.max_epochs", "2", logger=None)
    assert run_id() == logged
    command("fit", *quick, logger=None)
    assert run_id() is None


def test_the_shipped_logger(command, tmp_path):
    piece = find("logger/wandb")
    saved = [f"--trainer.logger.save_dir={tmp_path}", "--trainer.logger.offline=true"]
    command("fit", "-c", "logger/wandb", *saved, "--trainer.max_epochs", "1", logger=None)
    (logged,) = offline_runs(tmp_path)
    assert logged.project == yaml.safe_load(piece.read_text())["trainer"]["logger"]["init_args"]["project"]


def test_nothing_needs_wandb_without_its_logger(command, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # importing it fails from here on
    for module in (flow_pl.callbacks.wandb_run, flow_pl.callbacks.wandb_results):
        runpy.run_path(module.__file__)
    command("fit", "--trainer.max_epochs", "1", logger=None)
    command("test", "--ckpt_path", tmp_path / "run" / "checkpoints" / "last.ckpt", logger=None)
