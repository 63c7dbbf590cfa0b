"""The folder of a run through several commands: what is taken, what is kept, what is refused, what is said."""

import sys
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch.callbacks import Callback

import flow_pl
from flow_pl import FederatedModule
from flow_pl.__main__ import main
from flow_pl.cli import run
from flow_pl.errors import ConfigurationError
from flow_pl.methods import Flow
from flow_pl.models import MLP
from flow_pl.models.routers import InstanceRouter
from flow_pl.results.run_folder import put_aside
from flow_pl.utils.checkpoints import look_at
from tests.test_cli import config, fails  # noqa: F401 (a fixture)

QUIET = ["--trainer.logger=false", "--trainer.enable_progress_bar=false"]


def command(config, name, *options):  # noqa: F811
    """Run one and return what it made."""
    return run([name, "--config", str(config), *QUIET, *map(str, options)])


@pytest.fixture
def root(tmp_path):
    return tmp_path / "run"


def weights(path):
    return torch.cat([p.flatten() for p in torch.load(path, weights_only=True)["state_dict"].values()])


class StopIn(Callback):
    """Raises in the second round, in one of the hooks."""

    def __init__(self, hook: str) -> None:
        self.hook = hook

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self._stop(trainer, "first chunk" if batch_idx == 0 else "last chunk" if trainer.is_last_batch else "")

    def on_validation_batch_end(self, trainer, *_):
        self._stop(trainer, "validation")

    def on_validation_end(self, trainer, pl_module):
        self._stop(trainer, "end of validation")

    def _stop(self, trainer, hook):
        if trainer.current_epoch == 1 and hook == self.hook:
            raise RuntimeError("stopped")


# --- which checkpoint a command takes


@pytest.mark.parametrize(
    "name", ["test", *(pytest.param(name, marks=pytest.mark.slow) for name in ("validate", "predict"))]
)
def test_the_best_checkpoint_is_taken_and_named(config, finished, capsys, name):  # noqa: F811
    capsys.readouterr()
    cli = command(config, name)
    best = finished / "checkpoints" / "best.ckpt"
    said = capsys.readouterr().out
    assert f"{name}: {best} (round {look_at(best)['global_step']})" in said
    assert torch.equal(torch.cat([p.flatten() for p in cli.model.state_dict().values()]), weights(best))


@pytest.mark.parametrize(
    ("name", "word"),
    [
        *[("test", None), ("validate", "best"), ("predict", "last"), ("test", "hpc")],
        *[pytest.param("test", word, marks=pytest.mark.slow) for word in ("best", "last")],
        *[pytest.param("validate", word, marks=pytest.mark.slow) for word in (None, "last", "hpc")],
        *[pytest.param("predict", word, marks=pytest.mark.slow) for word in (None, "best", "hpc")],
    ],
)
def test_an_untrained_model_is_refused(config, capsys, name, word):  # noqa: F811
    code, error = fails(capsys, name, "--config", config, *([] if word is None else ["--ckpt_path", word]))
    assert code == 1
    assert "no trained model found: " in error
    assert "train it first with `flow-pl fit`" in error


def test_a_fit_from_the_best_round_needs_one(config, root, capsys):  # noqa: F811
    code, error = fails(capsys, "fit", "--config", config, "--ckpt_path", "best")
    assert (code, "no trained model found" in error) == (1, True)
    command(config, "fit")
    cli = command(config, "fit", "--ckpt_path", "best", "--trainer.max_epochs", 3)
    assert cli.trainer.global_step == 3
    assert not (root / "earlier").exists()


def test_words_are_those_of_the_run_and_a_missing_one_names_what_is_there(config, finished, capsys):  # noqa: F811
    last, best = (finished / "checkpoints" / f"{name}.ckpt" for name in ("last", "best"))
    for word, path in (("last", last), ("best", best)):
        capsys.readouterr()
        command(config, "test", "--ckpt_path", word)
        assert f"test: {path} (round" in capsys.readouterr().out
    best.unlink()
    capsys.readouterr()
    command(config, "test")
    assert f"test: {last} (round 2, the last one, since no round was validated)" in capsys.readouterr().out
    code, error = fails(capsys, "test", "--config", config, "--ckpt_path", "best")
    assert (code, f"found {last}" in error) == (1, True)


def test_a_trial_needs_no_checkpoint_and_a_trainer_in_python_tests_what_it_has(config, root):  # noqa: F811
    command(config, "test", "--trainer.fast_dev_run", "true")
    assert not root.exists() or not list(root.rglob("*.ckpt"))
    cli = command(config, "fit")
    (seen, _) = cli.trainer.test(cli.model, datamodule=cli.datamodule)
    assert {"test/seen/personalized_accuracy"} <= seen.keys()


# --- one run in a folder


def test_a_second_fit_puts_the_first_run_aside_whole(config, root, capsys):  # noqa: F811
    command(config, "fit", "--trainer.max_epochs", 3)
    command(config, "predict")
    before = {path.name: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    assert {"best.ckpt", "last.ckpt", "config.yaml", "predictions.csv"} <= before.keys()
    capsys.readouterr()
    # without a validation there is no best.ckpt: the old one must not stand in for it
    command(config, "fit", "--seed_everything", 5, "--trainer.check_val_every_n_epoch", 9)
    assert f"an earlier run in {root} was moved to {root / 'earlier' / '1'}" in capsys.readouterr().out
    kept = {path.name: path.read_bytes() for path in (root / "earlier" / "1").rglob("*") if path.is_file()}
    assert {**kept, "config.yaml": b""} == {**before, "config.yaml": b""}
    assert [path.name for path in (root / "checkpoints").iterdir()] == ["last.ckpt"]
    assert not (root / "predictions.csv").exists()
    assert yaml.safe_load((root / "config.yaml").read_text())["seed_everything"] == 5
    command(config, "fit")
    assert look_at(root / "earlier" / "2" / "checkpoints" / "last.ckpt")["global_step"] == 2


def test_the_settings_of_a_run_put_aside_name_its_new_folder(config, root, capsys):  # noqa: F811
    """So a test with them is of that run; nothing else in them has changed."""
    command(config, "fit", "--trainer.max_epochs", 1)
    before = yaml.safe_load((root / "config.yaml").read_text())
    command(config, "fit")
    moved = root / "earlier" / "1"
    before["trainer"]["default_root_dir"] = str(moved)
    assert yaml.safe_load((moved / "config.yaml").read_text()) == before
    capsys.readouterr()
    command(moved / "config.yaml", "test")
    assert f"test: {moved / 'checkpoints' / 'best.ckpt'} (round 1" in capsys.readouterr().out


def test_a_run_put_aside_takes_its_logs_along(tmp_path):
    """Those of its fit and its test; the one that the new run writes stays."""
    root = tmp_path / "run"
    for number in range(3):
        (root / "logs" / f"version_{number}").mkdir(parents=True)
        (root / "logs" / f"version_{number}" / "metrics.csv").write_text(str(number))
    assert put_aside(root) is None
    (root / "clients.csv").write_text("a result")
    moved = put_aside(root, [root / "logs" / "version_2"])
    assert sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()) == [
        "earlier/1/clients.csv",
        "earlier/1/logs/version_0/metrics.csv",
        "earlier/1/logs/version_1/metrics.csv",
        "logs/version_2/metrics.csv",
    ]
    assert moved == root / "earlier" / "1"


@pytest.mark.slow
def test_a_fit_that_goes_on_a_trial_and_one_that_is_refused_leave_everything_in_place(config, root, capsys):  # noqa: F811
    command(config, "fit")
    command(config, "fit", "--ckpt_path", "last", "--trainer.max_epochs", 3)
    command(config, "fit", "--trainer.fast_dev_run", "true")
    fails(capsys, "fit", "--config", config, "--model.backbone.in_features", 7)
    assert not (root / "earlier").exists()
    assert look_at(root / "checkpoints" / "last.ckpt")["global_step"] == 3


@pytest.mark.slow
def test_a_fit_from_the_checkpoint_of_another_run_takes_the_place_of_the_one_there(config, root, tmp_path):  # noqa: F811
    command(config, "fit")
    command(config, "fit", "--trainer.default_root_dir", tmp_path / "other")
    last = tmp_path / "other" / "checkpoints" / "last.ckpt"
    command(config, "fit", "--trainer.max_epochs", 3, "--ckpt_path", last)
    assert look_at(root / "earlier" / "1" / "checkpoints" / "last.ckpt")["global_step"] == 2
    command(
        config, "fit", "--trainer.max_epochs", 3, "--ckpt_path", root / "earlier" / "1" / "checkpoints" / "last.ckpt"
    )
    assert look_at(root / "earlier" / "2" / "checkpoints" / "last.ckpt")["global_step"] == 3


def test_settings_of_another_hand_in_the_folder_are_kept(config, root):  # noqa: F811
    root.mkdir()
    mine = root / "config.yaml"
    mine.write_text("# mine\n" + config.read_text())
    command(mine, "fit")
    assert (root / "earlier" / "1" / "config.yaml").read_text().startswith("# mine")
    command(mine, "test")


@pytest.mark.parametrize(
    ("program", "named"), [("/bin/flow-pl", "flow-pl"), ("/lib/flow_pl/__main__.py", "python -m flow_pl")]
)
def test_a_fit_ends_by_saying_where_it_is_and_the_command_it_names_works(
    config,  # noqa: F811
    root,
    capsys,
    monkeypatch,
    program,
    named,
):
    monkeypatch.setattr(sys, "argv", [program])
    command(config, "fit", "--trainer.max_epochs", 3)
    said = capsys.readouterr().out
    best = root / "checkpoints" / "best.ckpt"
    assert f"run: {root}, 3 rounds\n" in said
    assert f"best: round {look_at(best)['global_step']}, {best}\n" in said
    (line,) = [line for line in said.splitlines() if line.startswith("test it: ")]
    assert line.startswith(f"test it: {named} test ")
    main(line.removeprefix(f"test it: {named} ").split())
    assert f"test: {best} (round" in capsys.readouterr().out


def test_validate_prints_the_table_in_percent(config, finished, capsys):  # noqa: F811
    capsys.readouterr()
    cli = command(config, "validate")
    said = capsys.readouterr().out
    assert "validation clients" in said
    assert f"{100 * float(cli.trainer.callback_metrics['val/personalized_accuracy']):.2f}" in said
    assert "Validate metric" not in said


# --- callbacks of a configuration


@pytest.mark.parametrize(
    ("listed", "files"),
    [
        pytest.param(
            ["OnExceptionCheckpoint", "--trainer.callbacks.dirpath={root}/crash"],
            ["best.ckpt", "last.ckpt"],
            marks=pytest.mark.slow,
        ),
        (["ModelCheckpoint", "--trainer.callbacks.dirpath={root}/checkpoints"], ["best.ckpt", "epoch", "last.ckpt"]),
        (["ModelCheckpoint", "--trainer.callbacks.filename=mine"], ["best.ckpt", "last.ckpt"]),
        pytest.param(
            [
                "ModelCheckpoint",
                "--trainer.callbacks.dirpath={root}/mine",
                "--trainer.callbacks.filename=best",
                "--trainer.callbacks.monitor=val/personalized_accuracy",
                "--trainer.callbacks.mode=max",
            ],
            ["best.ckpt", "last.ckpt"],
            marks=pytest.mark.slow,
        ),
        pytest.param(
            ["EarlyStopping", "--trainer.callbacks.monitor=val/gain"],
            ["best.ckpt", "last.ckpt"],
            marks=pytest.mark.slow,
        ),
    ],
    ids=["exception", "same folder", "no folder", "same name", "early stopping"],
)
def test_a_listed_callback_is_added(config, root, listed, files):  # noqa: F811
    first, *options = (word.format(root=root) for word in listed)
    cli = command(config, "fit", f"--trainer.callbacks+={first}", *options)
    there = sorted(path.name for path in (root / "checkpoints").glob("*.ckpt") if path.stem != "mine")
    assert [name if name in files else name.partition("=")[0] for name in there] == files
    assert look_at(root / "checkpoints" / "last.ckpt")["global_step"] == 2
    assert any(type(callback).__name__ == first for callback in cli.trainer.callbacks)


@pytest.mark.slow
@pytest.mark.parametrize("folder", [[], ["--trainer.callbacks.dirpath={root}/../run/checkpoints"]])
def test_a_checkpoint_callback_that_writes_best_ckpt_replaces_the_one_that_would(config, root, folder):  # noqa: F811
    options = ["--trainer.callbacks.filename=best", "--trainer.callbacks.monitor=val/generalized_accuracy"]
    options += ["--trainer.callbacks.mode=max", "--trainer.callbacks.enable_version_counter=false"]
    options += [option.format(root=root) for option in folder]
    cli = command(config, "fit", "--trainer.callbacks+=ModelCheckpoint", *options)
    monitors = [(callback.filename, callback.monitor) for callback in cli.trainer.checkpoint_callbacks]
    assert sorted(monitors, key=str) == [("best", "val/generalized_accuracy"), ("last", None)]
    assert sorted(path.name for path in (root / "checkpoints").iterdir()) == ["best.ckpt", "last.ckpt"]
    command(config, "test")


@pytest.mark.parametrize(
    "bar",
    [
        "TQDMProgressBar",
        *(pytest.param(bar, marks=pytest.mark.slow) for bar in ("RichProgressBar", "RoundProgressBar")),
    ],
)
def test_another_progress_bar_replaces_the_default_one(config, bar):  # noqa: F811
    cli = run(["fit", "--config", str(config), f"--trainer.callbacks+={bar}", "--trainer.fast_dev_run=true"])
    assert type(cli.trainer.progress_bar_callback).__name__ == bar


@pytest.mark.slow
@pytest.mark.parametrize(
    "hook",
    [
        "first chunk",
        "validation",
        *(pytest.param(hook, marks=pytest.mark.extended) for hook in ("last chunk", "end of validation")),
    ],
)
def test_a_run_that_breaks_off_goes_on_from_the_checkpoint_of_its_exception(config, root, hook):  # noqa: F811
    """Between two chunks the round is made anew, since the updates of the first ones are lost."""
    crash = ["--trainer.callbacks+=OnExceptionCheckpoint", f"--trainer.callbacks.dirpath={root}/crash"]
    rounds = ["--trainer.max_epochs", 3, "--data.chunk_size", 1]
    stop = ["--trainer.callbacks+=tests.test_runs.StopIn", f"--trainer.callbacks.hook={hook}"]
    with pytest.raises(RuntimeError, match="stopped"):
        command(config, "fit", *rounds, *crash, *stop)
    assert (root / "crash" / "on_exception.ckpt").is_file()
    assert look_at(root / "checkpoints" / "last.ckpt")["global_step"] == 1
    command(config, "fit", *rounds, *crash)
    command(config, "fit", *rounds, "--trainer.default_root_dir", root.with_name("whole"))
    last = Path("checkpoints") / "last.ckpt"
    assert torch.equal(weights(root / last), weights(root.with_name("whole") / last))


# --- a run is loaded again


def test_a_module_is_loaded_from_its_checkpoint_alone(config, finished, tmp_path):  # noqa: F811
    last = finished / "checkpoints" / "last.ckpt"
    state = torch.random.get_rng_state()
    module = FederatedModule.load_from_checkpoint(last)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(torch.cat([p.flatten() for p in module.state_dict().values()]), weights(last))
    assert type(module.method).__name__ == "Flow"
    assert module.loop.batch_size == 4
    again = FederatedModule.load_from_checkpoint(str(last), map_location="cpu", hparams_file=finished / "config.yaml")
    assert again.loop.batch_size == 4
    changed = FederatedModule.load_from_checkpoint(last, loop=flow_pl.FederatedLoop(batch_size=7))
    assert changed.loop.batch_size == 7
    module, data = flow_pl.load(None, last, "--data.cohort_size=2")
    assert data.cohort_size == 2
    assert torch.equal(torch.cat([p.flatten() for p in module.state_dict().values()]), weights(last))


def test_a_checkpoint_without_a_configuration_says_what_it_needs(config, root):  # noqa: F811
    cli = command(config, "fit")
    path = root / "checkpoints" / "last.ckpt"
    saved = torch.load(path, weights_only=True)
    del saved["configuration"]
    torch.save(saved, path)
    with pytest.raises(ConfigurationError, match=r"load_from_checkpoint\(path, backbone=..., method="):
        FederatedModule.load_from_checkpoint(path)
    with pytest.raises(ConfigurationError, match="holds no configuration"):
        flow_pl.load(None, path)
    model = cli.model
    copy = FederatedModule.load_from_checkpoint(path, backbone=MLP(6, 3, [5]), method=make_flow(), loop=model.loop)
    assert torch.equal(torch.cat([p.flatten() for p in copy.state_dict().values()]), weights(path))


def make_flow():
    return Flow(router=lambda blocks: InstanceRouter(blocks, hidden=[4]))


@pytest.mark.parametrize("path", ["os.system", "subprocess.Popen", "tests.test_runs.StopIn", "no.such.Class"])
def test_a_class_path_in_a_checkpoint_is_looked_at_before_it_is_called(config, finished, path):  # noqa: F811
    last = finished / "checkpoints" / "last.ckpt"
    saved = torch.load(last, weights_only=True)
    saved["configuration"]["model"]["backbone"] = {"class_path": path, "init_args": {}}
    torch.save(saved, last)
    with pytest.raises(ConfigurationError):
        FederatedModule.load_from_checkpoint(last)


@pytest.mark.parametrize("logger", [pytest.param("TensorBoardLogger", marks=pytest.mark.slow), "CSVLogger"])
def test_the_settings_are_beside_the_log_and_in_the_folder_of_the_run(config, root, tmp_path, logger):  # noqa: F811
    options = ["--trainer.logger", logger, f"--trainer.logger.save_dir={tmp_path / 'logged'}"]
    run(["fit", "--config", str(config), *options, "--data.cohort_size=2"])
    (beside,) = (tmp_path / "logged").rglob("config.yaml")
    for path in (beside, root / "config.yaml"):
        settings = yaml.safe_load(path.read_text())
        assert settings["data"]["init_args"]["cohort_size"] == 2
        assert settings.keys() == {"seed_everything", "trainer", "data", "model"}
    module, _ = flow_pl.load(root / "config.yaml", root / "checkpoints" / "best.ckpt")
    assert type(module.method).__name__ == "Flow"
