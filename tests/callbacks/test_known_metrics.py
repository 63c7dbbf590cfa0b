"""Callbacks that wait for a metric: refused before training where no round will have it."""

import pytest

from flow_pl.callbacks._known_metrics import check_monitors, loss_metrics, may_be_logged, validation_metrics
from flow_pl.cli import run
from tests.test_cli import config, fails  # noqa: F401 (a fixture)


def waiting(kind, monitor, *more):
    return [f"--trainer.callbacks+={kind}", f"--trainer.callbacks.monitor={monitor}", *more]


@pytest.mark.parametrize(
    ("kind", "monitor"),
    [
        ("EarlyStopping", "val/nonsense"),
        ("ModelCheckpoint", "train/updat_norm"),
        *(
            pytest.param(kind, monitor, marks=pytest.mark.slow)
            for kind, monitor in (("ModelCheckpoint", "val_loss"), ("EarlyStopping", "diagnostics/G"))
        ),
    ],
)
def test_an_unknown_metric_is_refused_with_those_there_are(config, tmp_path, capsys, kind, monitor):  # noqa: F811
    status, said = fails(capsys, "fit", "--config", config, *waiting(kind, monitor))
    assert status == 1
    assert f"error: {kind} monitors {monitor}, which no round logs." in said
    assert "train/bytes_down, train/padding, val/generalized_accuracy, " in said
    assert "val/routed_local/head" in said
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_the_nearest_metric_is_named(config, capsys):  # noqa: F811
    _, said = fails(capsys, "fit", "--config", config, *waiting("EarlyStopping", "val/personalised_accuracy"))
    assert "Did you mean val/personalized_accuracy?" in said


def test_a_metric_of_a_validation_that_is_not_made_is_refused(config, capsys):  # noqa: F811
    options = waiting("EarlyStopping", "val/gain", "--trainer.limit_val_batches=0")
    _, said = fails(capsys, "fit", "--config", config, *options)
    assert "EarlyStopping monitors val/gain, but nothing is validated" in said


@pytest.mark.parametrize(
    "method", ["Flow", *(pytest.param(name, marks=pytest.mark.slow) for name in ("APFL", "FedAvg", "KNNPer", "Ditto"))]
)
def test_all_metrics_of_a_fit_are_known_and_may_be_waited_for(config, method):  # noqa: F811
    cli = run(["fit", "--config", str(config), f"--model.method={method}", "--trainer.enable_progress_bar=false"])
    logged = {name for name in cli.trainer.callback_metrics if name.startswith("val/") or name.endswith("_loss")}
    known = {*validation_metrics(cli.trainer, cli.trainer.callbacks, cli.model), *loss_metrics(cli.model)}
    assert logged
    assert logged <= known


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        ["model.method=Flow", "data.dropout=0.3", "data.deadline=1000", "trainer.precision=bf16-mixed"],
        [
            "model.method=Ditto",
            "model.attack=SignFlip",
            "model.aggregation=CoordinateMedian",
            "model.loop.weighting=uniform",
        ],
        ["model.attack=SignFlip", "model.aggregation=CoordinateMedian", "model.loop.weighting=uniform"],
        ["model.method=FedAvg", "trainer.callbacks+=ConvergenceDiagnostics"],
        ["model.method=Flow", "trainer.callbacks+=ConvergenceDiagnostics"],
    ],
    ids=lambda options: "-".join(option.rpartition("=")[2] for option in options),
)
def test_all_that_rounds_tell_of_themselves_may_be_waited_for(config, options):  # noqa: F811
    cli = run(["fit", "--config", str(config), *(f"--{option}" for option in options)])
    told = [name for name in cli.trainer.callback_metrics if name.startswith(("train/", "diagnostics/"))]
    assert len(told) >= 8
    assert all(
        name in loss_metrics(cli.model) or may_be_logged(name, cli.trainer.callbacks, cli.model) for name in told
    ), told
    assert not may_be_logged("diagnostics/nonsense", cli.trainer.callbacks, cli.model)


@pytest.mark.parametrize(
    "monitor",
    [
        "train/global_loss",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("train/update_norm", "val/gain", "step")),
    ],
)
def test_what_comes_may_be_waited_for(config, monitor):  # noqa: F811
    cli = run(["fit", "--config", str(config), *waiting("EarlyStopping", monitor)])
    assert cli.trainer.global_step == 2


def test_a_callback_of_the_user_may_log_anything(config):  # noqa: F811
    cli = run(["fit", "--config", str(config), "--trainer.fast_dev_run=true"])
    stopping = type("Stopping", (), {"monitor": "val/mine"})()
    cli.trainer.callbacks.append(stopping)
    check_monitors(cli.trainer, cli.model)


@pytest.mark.parametrize("callback", ["ClientResults", pytest.param("RoutingReport", marks=pytest.mark.slow)])
def test_callbacks_of_a_test_alone_ask_for_the_trainer_and_get_it(config, callback):  # noqa: F811
    cli = run(["fit", "--config", str(config), f"--trainer.callbacks+={callback}"])
    assert cli.trainer.current_epoch > 0
