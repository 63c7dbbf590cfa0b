"""The command line as a user meets it: real arguments, real files, real messages."""

import csv
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import wandb
import yaml

from flow_pl.__main__ import let_threads_sleep, main
from flow_pl.cli import run

TINY = """
seed_everything: 1
trainer:
  max_epochs: 2
  accelerator: cpu
  devices: 1
  default_root_dir: {root}/run
  enable_model_summary: false
data:
  class_path: SyntheticData
  init_args:
    num_clients: 8
    num_features: 6
    num_classes: 3
    mean_log_size: 2.0
    sigma_log_size: 0.3
    min_size: 8
    max_size: 20
    cohort_size: 3
    new_client_fraction: 0.25
    cache_dir: {root}/cache
model:
  backbone:
    class_path: MLP
    init_args: {{in_features: 6, num_classes: 3, hidden: [5]}}
  loop:
    class_path: FederatedLoop
    init_args: {{batch_size: 4, local_epochs: 1}}
  method:
    class_path: Flow
    init_args:
      router: {{class_path: InstanceRouter, init_args: {{hidden: [4]}}}}
"""


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY.format(root=tmp_path))
    return path


def fails(capsys, *args):
    """Run a command that must fail; returns its exit status and the error message."""
    with pytest.raises(SystemExit) as stop:
        main([*map(str, args)])
    return stop.value.code, capsys.readouterr().err


def _array_config(config, file, **settings):
    """The configuration with the user's own file as its data."""
    text = config.read_text()
    settings = {"path": str(file), "cohort_size": 3, "cache_dir": str(file.parent / "arrays"), **settings}
    data = yaml.safe_dump({"data": {"class_path": "ArrayData", "init_args": settings}})
    config.write_text(text[: text.index("data:")] + data + text[text.index("model:") :])
    return config


def test_fit_then_validate_test_and_predict_from_the_best_checkpoint(config, tmp_path, capsys):
    cli = run(["fit", "--config", str(config)])
    assert cli.trainer.global_step == 2
    best = tmp_path / "run" / "checkpoints" / "best.ckpt"
    assert best.exists()
    assert (tmp_path / "run" / "checkpoints" / "last.ckpt").exists()
    saved = yaml.safe_load((tmp_path / "run" / "logs" / "version_0" / "config.yaml").read_text())
    assert saved["model"]["method"]["class_path"] == "flow_pl.methods.Flow"
    assert saved["trainer"]["inference_mode"] is False
    with open(tmp_path / "run" / "logs" / "version_0" / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows if row["train/global_loss"]] == ["1", "2"]
    assert all(row["val/personalized_accuracy"] for row in rows if not row["train/global_loss"])

    main(["validate", "--config", str(config), "--ckpt_path", str(best)])
    capsys.readouterr()
    results = tmp_path / "results.json"
    table = ["--trainer.callbacks+=ResultsTable", f"--trainer.callbacks.path={results}"]
    main(["test", "--config", str(config), "--ckpt_path", str(best), *table])
    printed = capsys.readouterr().out
    for words in (
        "Flow with MLP",
        "seen clients",
        "new clients",
        "generalized accuracy",
        "10th percentile",
        "best fixed mixture",
    ):
        assert words in printed
    assert json.loads(results.read_text())

    output = ["--trainer.callbacks+=PredictionWriter", f"--trainer.callbacks.path={tmp_path / 'out.csv'}"]
    main(["predict", "--config", str(config), "--ckpt_path", str(best), *output])
    with open(tmp_path / "out.csv") as file:
        rows = list(csv.DictReader(file))
    assert {row["population"] for row in rows} == {"seen", "new"}
    assert {row["route_head"] for row in rows} <= {"local", "global"}
    assert len({row["client"] for row in rows}) == 8


def test_predict_without_an_output_option_writes_into_the_folder_of_the_run(config, tmp_path, capsys):
    (tmp_path / "predictions.csv").write_text("of another method")
    main(["fit", "--config", str(config)])
    main(["predict", "--config", str(config)])
    written = tmp_path / "run" / "predictions.csv"
    assert written.read_text().startswith("client,population,instance,prediction,label")
    assert f"predictions: {written}" in capsys.readouterr().out
    assert (tmp_path / "predictions.csv").read_text() == "of another method"


def test_class_names_need_no_paths_and_settings_can_be_given_on_the_command_line(config):
    options = ["--model.method", "Interpolation", "--model.method.alpha", "0.3", "--data.cohort_size", "2"]
    cli = run(["fit", "--config", str(config), *options, "--trainer.fast_dev_run", "true"])
    assert type(cli.model.method).__name__ == "Interpolation"
    assert cli.model.method.alpha == 0.3
    assert cli.datamodule.cohort_size == 2


def test_server_and_client_optimizers_by_class_name(config):
    options = ["--model.server_optimizer", "torch.optim.Adam", "--model.server_optimizer.lr", "0.01"]
    options += [
        "--model.server_scheduler",
        "torch.optim.lr_scheduler.StepLR",
        "--model.server_scheduler.step_size",
        "1",
    ]
    options += ["--model.loop.client_optimizer", "torch.optim.Adam", "--model.loop.client_optimizer.lr", "1e-05"]
    cli = run(["fit", "--config", str(config), *options])
    (optimizer,) = cli.trainer.optimizers
    assert isinstance(optimizer, torch.optim.Adam)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.01 * 0.1**2)


def test_a_backbone_that_is_not_ours_by_class_path(config, tmp_path, monkeypatch):
    (tmp_path / "their_models.py").write_text(
        "from torch import nn\n"
        "class Theirs(nn.Sequential):\n"
        "    def __init__(self, width: int) -> None:\n"
        "        super().__init__(nn.Linear(6, width), nn.SiLU(), nn.LayerNorm(width), nn.Linear(width, 3))\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    yaml_text = config.read_text().replace("class_path: MLP", "class_path: their_models.Theirs")
    config.write_text(yaml_text.replace("{in_features: 6, num_classes: 3, hidden: [5]}", "{width: 7}"))
    cli = run(["fit", "--config", str(config)])
    assert cli.model.route_names == ["0", "2", "3"]
    assert "val/routed_local/3" in cli.trainer.callback_metrics


def test_unlabelled_rows_are_predicted(config, tmp_path):
    """ArrayData with -1 labels: rows without a label are predicted, their correctness is empty."""
    random = np.random.default_rng(0)
    y = random.integers(3, size=120)
    y[::10] = -1
    np.savez(tmp_path / "mine.npz", x=random.normal(size=(120, 6)).astype("f4"), y=y, client=np.arange(120) % 6)
    for command in ("fit", "predict"):
        main([command, "--config", str(_array_config(config, tmp_path / "mine.npz"))])
    with open(tmp_path / "run" / "predictions.csv") as file:
        rows = list(csv.DictReader(file))
    unlabelled = [row for row in rows if row["label"] == ""]
    assert len(unlabelled) == 12
    assert all(row["personalized_correct"] == "" and row["prediction"] in "012" for row in unlabelled)


@pytest.mark.slow
def test_labels_that_are_texts_are_predicted_by_name(config, tmp_path):
    """Sizes of the backbone are left out: they are those of the data."""
    random = np.random.default_rng(0)
    y = random.choice(["ash", "elm", "oak"], size=120)
    y[::10] = ""
    np.savez(tmp_path / "mine.npz", x=random.normal(size=(120, 6)).astype("f4"), y=y, client=np.arange(120) % 6)
    path = _with_model(_array_config(config, tmp_path / "mine.npz"), backbone={"class_path": "MLP"})
    _, _, rows = _tested_and_predicted(path, tmp_path)
    names = ["ash", "elm", "oak"]
    assert all(row["predicted_class"] == names[int(row["prediction"])] for row in rows)
    assert all(row["true_class"] == (names[int(row["label"])] if row["label"] else "") for row in rows)
    assert {row["label"] for row in rows} == {"", "0", "1", "2"}


def _with_model(config, **model):
    """The configuration with another model; what is not given stays."""
    settings = yaml.safe_load(config.read_text())
    settings["model"] |= model
    config.write_text(yaml.safe_dump(settings))
    return str(config)


def _tested_and_predicted(config, folder):
    """The metrics of a test and the rows of predict, of one model."""
    cli = run(["fit", "--config", config, "--trainer.max_epochs", "1"])
    best = ["--ckpt_path", str(folder / "run" / "checkpoints" / "last.ckpt")]
    tested = run(["test", "--config", config, *best]).trainer.callback_metrics
    main(["predict", "--config", config, *best])
    with open(folder / "run" / "predictions.csv") as file:
        rows = list(csv.DictReader(file))
    return cli, {name: float(value) for name, value in tested.items()}, rows


def _share_right(rows, column):
    return sum(row[column] == "true" for row in rows) / len(rows)


@pytest.mark.slow
def test_predictions_for_tokens_agree_with_the_accuracies_of_a_test(config, tmp_path):
    """One row for each token, none for padding; two accuracies counted from the rows; unlabelled sentences as well."""
    random = np.random.default_rng(0)
    tokens = random.choice([1, 4, 5, 6], size=(60, 6), p=[0.2, 0.4, 0.3, 0.1])
    tokens[:, 0] = 2
    for sentence, length in zip(tokens, random.integers(3, 7, size=60), strict=True):
        sentence[length - 1] = 3
        sentence[length:] = 0
    x, y = tokens[:, :-1].copy(), tokens[:, 1:].copy()
    x[x == 3] = 0  # the end is a target only
    y[5::10] = -1
    np.savez(tmp_path / "text.npz", x=x, y=y, client=np.arange(60) % 5)
    router = {"class_path": "SequenceRouter", "init_args": {"hidden": [4], "hidden_behind": [4], "dropout": 0.0}}
    config = _with_model(
        _array_config(config, tmp_path / "text.npz", num_classes=7, chunk_size=2, test_fraction=0.3),
        backbone={
            "class_path": "NextWordLSTM",
            "init_args": {"num_tokens": 7, "embedding": 4, "hidden": 5, "projection": 4},
        },
        objective="NextToken",
        method={"class_path": "Flow", "init_args": {"router": router}},
    )
    _, metrics, rows = _tested_and_predicted(config, tmp_path)
    assert list(rows[0])[:6] == ["client", "population", "instance", "position", "prediction", "label"]
    assert list(rows[0])[-3:] == ["route_lstm", "route_linear", "route_head"]
    assert sum(row["label"] == "" for row in rows) == (x[5::10] != 0).sum()
    labelled = [row for row in rows if row["label"]]
    for population in ("seen", "new"):
        counted = [row for row in labelled if row["population"] == population]
        words = [row for row in counted if row["label"] not in ("1", "3")]
        assert 0 < len(words) < len(counted)
        for model in ("generalized", "personalized"):
            name, column = f"test/{population}/{model}_accuracy", f"{model}_correct"
            assert metrics[name] == pytest.approx(_share_right(counted, column))
            assert metrics[f"{name}_without_oov_eos"] == pytest.approx(_share_right(words, column))


@pytest.mark.slow
def test_predictions_of_several_labels_agree_with_the_recall_of_a_test(config, tmp_path):
    random = np.random.default_rng(0)
    x = random.normal(size=(60, 6)).astype("f4")
    y = (x[:, :4] + random.normal(size=(60, 4)) > 0.5).astype("i8")
    np.savez(tmp_path / "tags.npz", x=x, y=y, client=np.arange(60) % 5)
    config = _with_model(
        _array_config(config, tmp_path / "tags.npz"),
        backbone={"class_path": "LogisticRegression", "init_args": {"in_features": 6, "num_classes": 4}},
        objective={"class_path": "MultiLabel", "init_args": {"k": 2}},
        method={"class_path": "FineTuning", "init_args": {}},
    )
    cli, metrics, rows = _tested_and_predicted(config, tmp_path)
    assert cli.model.objective.k == 2
    assert all(len(row["prediction"].split()) == 2 for row in rows)
    for population in ("seen", "new"):
        counted = [row for row in rows if row["population"] == population]
        labels = sum(len(row["label"].split()) for row in counted)
        found = sum(len(set(row["label"].split()) & set(row["prediction"].split())) for row in counted)
        assert found == sum(int(row["personalized_correct"]) for row in counted)
        assert metrics[f"test/{population}/personalized_accuracy"] == pytest.approx(found / labels)


@pytest.mark.parametrize(
    ("options", "written"),
    [
        pytest.param(
            ["TensorBoardLogger", "--trainer.logger.save_dir={root}"],
            "**/events.out.tfevents.*",
            marks=pytest.mark.slow,
        ),
        (
            ["WandbLogger", "--trainer.logger.save_dir={root}", "--trainer.logger.offline=true"],
            "wandb/offline-run-*/*.wandb",
        ),
    ],
    ids=["tensorboard", "wandb"],
)
def test_other_loggers_by_configuration(config, tmp_path, options, written):
    """The metrics of both rounds, and the settings, without a network."""
    options = [option.format(root=tmp_path / "logged") for option in options]
    cli = run(["fit", "--config", str(config), "--trainer.logger", *options])
    if "Wandb" in options[0]:
        summary = dict(cli.trainer.logger.experiment.summary)
        assert summary["val/personalized_accuracy"] == pytest.approx(
            float(cli.trainer.callback_metrics["val/personalized_accuracy"])
        )
        assert summary["trainer/global_step"] == 2
        assert cli.trainer.logger.experiment.config["model"]["method"]["class_path"] == "flow_pl.methods.Flow"
        wandb.finish()
    assert list((tmp_path / "logged").glob(written))


def test_defaults_can_be_switched_off(config):
    switches = ("enable_progress_bar", "enable_checkpointing", "logger")
    cli = run(["fit", "--config", str(config), *(f"--trainer.{switch}=false" for switch in switches)])
    assert not cli.trainer.checkpoint_callbacks
    assert cli.trainer.progress_bar_callback is None
    assert cli.trainer.logger is None


def test_print_config_is_a_config(config, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--config", str(config), "--print_config"])
    assert stop.value.code == 0
    printed = tmp_path / "printed.yaml"
    printed.write_text(capsys.readouterr().out)
    cli = run(["fit", "--config", str(printed), "--trainer.fast_dev_run", "true"])
    assert type(cli.model.method).__name__ == "Flow"


@pytest.mark.parametrize(
    ("args", "words"), [(["--help"], "predict"), (["fit", "--help"], "--model.method"), (["--version"], "0.")]
)
def test_help_and_version(args, words, capsys):
    with pytest.raises(SystemExit) as stop:
        main(args)
    assert stop.value.code == 0
    assert words in capsys.readouterr().out


@pytest.mark.parametrize("setting", [None, "OMP_WAIT_POLICY", "GOMP_SPINCOUNT"])
def test_threads_sleep_while_they_wait_unless_the_environment_says_how(monkeypatch, setting):
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"):
        monkeypatch.delenv(name, raising=False)
    if setting:
        monkeypatch.setenv(setting, "ACTIVE")
    let_threads_sleep()
    assert os.environ.get("OMP_WAIT_POLICY") == {None: "PASSIVE", "OMP_WAIT_POLICY": "ACTIVE"}.get(setting)
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)  # what is set in a test is unset behind it


def test_python_m_is_the_same_command():
    done = subprocess.run([sys.executable, "-m", "flow_pl", "--version"], capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stdout.startswith("flow-pl ")
