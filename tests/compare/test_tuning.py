"""`flow-pl tune`: the search for the settings of several methods, with the same effort for each."""

import csv
import inspect
import itertools
from pathlib import Path

import pytest
import yaml

from flow_pl import cli, methods, shipped
from flow_pl.__main__ import main
from flow_pl.compare import tune_command
from flow_pl.compare.settings import resolve
from flow_pl.compare.tuning import read_values
from flow_pl.errors import ConfigurationError
from tests.compare.test_compare import write_configs

DITTO = {"ditto": {"class_path": "Ditto", "init_args": {"regularization": 0.1}}, "fedavg": {"class_path": "FedAvg"}}
TUNE = ["--methods", "configs/tiny/*.yaml", "--out", "out"]


@pytest.fixture(autouse=True)
def _configs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_configs(tmp_path, DITTO)


class Executed:
    """Stands for the processes: a run's accuracy is a function of its settings, split and seed; None if it fails."""

    def __init__(self, accuracy):
        self.accuracy = accuracy
        self.trained = []
        self.rows = "those of the file"

    def __call__(self, runs, jobs, console):
        failures = {}
        for run in runs:
            if run.state() == "done":
                continue
            self.trained.append(run)
            run.prepare()
            (run.folder / "checkpoints").mkdir()
            value = self.accuracy(run, run.settings["model"]["method"]["init_args"])
            if value is None:
                failures[run] = "it diverged"
                continue
            rounds = run.settings["trainer"]["max_epochs"]
            (run.folder / "data.json").write_text(f'{{"rows": "{self.rows}"}}')
            (run.folder / "curve.csv").write_text(f"round,personalized_accuracy\n1,0.9\n{rounds},{value}\n")
            run.finish(1.0)
        return failures


@pytest.fixture
def execute(monkeypatch):
    def replace(accuracy):
        executed = Executed(accuracy)
        monkeypatch.setattr(tune_command, "execute_all", executed)
        return executed

    return replace


def peak(run, own):
    """Highest at regularization 0.3, and there at personal_lr_scale 0.1; elsewhere, a large scale is better."""
    if own["regularization"] == 0.3:
        return 0.8 if own["personal_lr_scale"] == 0.1 else 0.7
    return 0.2 + own["personal_lr_scale"] / 100


def test_each_setting_is_tried_with_the_best_value_of_the_one_before(execute):
    executed = execute(peak)
    assert tune_command.tune(TUNE) == 0
    own = [run.settings["model"]["method"]["init_args"] for run in executed.trained]
    tried = [(each["regularization"], each["personal_lr_scale"]) for each in own]
    first, second = [0.03, 0.1, 0.3, 1.0, 3.0], [0.03, 0.1, 0.3, 3.0]  # a scale of 1 was tried with the first
    assert tried == [(value, 1.0) for value in first] + [(0.3, value) for value in second]
    assert {run.checkpoint for run in executed.trained} == {None}
    assert {run.settings["trainer"]["check_val_every_n_epoch"] for run in executed.trained} == {3}
    table = Path("out/table.md").read_text()
    assert "| `ditto` | `regularization` | 0.03: 21.00, 0.1: 21.00, **0.3: 70.00**, 1: 21.00, 3: 21.00 |" in table
    assert "| `ditto` | `personal_lr_scale` | 0.03: 70.00, **0.1: 80.00**, 0.3: 70.00, 1: 70.00, 3: 70.00 |" in table
    assert "At an end" not in table


def test_the_configurations_are_the_methods_with_the_best_values(execute):
    execute(peak)
    tune_command.tune(TUNE)
    best, given = ([Path(folder, "ditto.yaml")] for folder in ("out", "configs/tiny"))
    common = [Path("configs/tiny/fedavg.yaml")]
    tuned, plain = resolve([*common, *best], []), resolve([*common, *given], [])
    assert tuned["model"]["method"]["init_args"] == {"regularization": 0.3, "personal_lr_scale": 0.1}
    assert tuned["model"]["method"]["class_path"] == plain["model"]["method"]["class_path"]
    assert tuned["data"] == plain["data"]
    untuned = yaml.safe_load(Path("out/fedavg.yaml").read_text())
    assert untuned == yaml.safe_load(Path("configs/tiny/fedavg.yaml").read_text())


def test_nothing_that_is_done_is_run_again_and_no_checkpoint_is_kept(execute):
    assert len((first := execute(peak)).trained) == 0
    tune_command.tune(TUNE)
    tune_command.tune(TUNE)
    assert len(first.trained) == 9
    assert not list(Path("out").rglob("checkpoints"))


def test_an_accuracy_is_the_mean_over_splits_and_seeds(execute):
    execute(lambda run, own: (run.split + 10 * run.seed) / 100)
    tune_command.tune([*TUNE, "--split-seeds", "1", "3", "--seeds", "0", "2"])
    assert "**0.03: 12.00**, 0.1: 12.00" in Path("out/table.md").read_text()
    with Path("out/runs.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["setting"] == "regularization" and row["value"] == "3"]
    expected = {(str(s), str(n)): (s + 10 * n) / 100 for s, n in itertools.product((1, 3), (0, 2))}
    assert {(row["split"], row["seed"]): float(row["personalized_accuracy"]) for row in rows} == expected


@pytest.mark.parametrize("broken", [None, float("nan")])
def test_a_value_whose_run_failed_or_diverged_is_not_chosen(execute, capsys, broken):
    execute(lambda run, own: broken if own["regularization"] == 3 else own["regularization"] / 10)
    assert tune_command.tune(TUNE) == (0 if broken else 1)
    table = Path("out/table.md").read_text()
    assert "**1: 10.00**, 3: - |" in table
    assert yaml.safe_load(Path("out/ditto.yaml").read_text())["model"]["method"]["init_args"]["regularization"] == 1
    assert ("it diverged" in capsys.readouterr().err) == (broken is None)


def test_a_method_without_any_result_gets_no_configuration(execute):
    execute(lambda run, own: None)
    assert tune_command.tune(TUNE) == 1
    assert not Path("out/ditto.yaml").exists()
    assert Path("out/fedavg.yaml").exists()


def test_a_best_value_at_an_end_is_named(execute):
    execute(lambda run, own: own["regularization"] / 10)
    tune_command.tune(TUNE)
    assert "At an end of the values that were tried: ditto (regularization 3)" in Path("out/table.md").read_text()


def test_values_of_ones_own_replace_the_shipped_ones(execute):
    executed = execute(peak)
    Path("mine.yaml").write_text("ditto: {regularization: [0.2, 0.3]}\nfedavg: {}\n")
    tune_command.tune([*TUNE, "--search", "mine.yaml"])
    own = [run.settings["model"]["method"]["init_args"]["regularization"] for run in executed.trained]
    assert own == [0.2, 0.3]


@pytest.mark.parametrize(
    ("search", "options", "message"),
    [
        ("ditto: [0.1]", [], "is not a search, expected for each method"),
        ("ditto: {regularization: [0.1, 0.1]}", [], "distinct values"),
        ("ditto: {regularization: []}", [], "is not a search"),
        ("ditto: {regularization: [few]}", [], "(?s)regularization of ditto cannot be few: .*float"),
        ("ditto: {regularization: [-1.0]}", [], "regularization of ditto cannot be -1: .*0 or more"),
        ("ditto: {strength: [1.0]}", [], "strength of ditto cannot be 1: .*does not accept"),
        ("{", [], "mine.yaml cannot be read"),
        (
            "{}",
            ["--trainer.max_epochs", "-1"],
            "tuned: trainer.max_epochs is -1, expected the number of rounds",
        ),
        ("{}", ["--trainer.fast_dev_run", "true"], "cannot be tuned: trainer.fast_dev_run is True"),
        ("{}", ["--trainer.limit_val_batches", "0"], "so nothing would be validated"),
        ("{}", ["--trainer.check_val_every_n_epoch", "1"], "is validated after its last round"),
        ("{}", ["--seed_everything", "1"], "use --seeds"),
        ("{}", ["--seeds", "0", "0"], "expected distinct seeds"),
    ],
)
def test_what_cannot_be_searched_is_refused_before_anything_runs(execute, search, options, message):
    executed = execute(peak)
    Path("mine.yaml").write_text(search)
    with pytest.raises(ConfigurationError, match=message):
        tune_command.tune([*TUNE, "--search", "mine.yaml", *options])
    assert executed.trained == []


def test_values_measured_on_other_rows_are_refused(execute):
    executed = execute(peak)
    Path("mine.yaml").write_text("ditto: {regularization: [0.2, 0.3]}")
    tune_command.tune([*TUNE, "--search", "mine.yaml"])
    executed.rows = "those of a file that was written again"
    Path("mine.yaml").write_text("ditto: {regularization: [0.3, 0.4]}")
    with pytest.raises(ConfigurationError, match="the data changed between the runs"):
        tune_command.tune([*TUNE, "--search", "mine.yaml"])


def test_a_method_without_values_is_refused(execute):
    execute(peak)
    Path("configs/tiny/ditto.yaml").rename("configs/tiny/mine.yaml")
    with pytest.raises(ConfigurationError, match="there are no values to try for mine: name them in a file"):
        tune_command.tune(TUNE)


def test_every_shipped_method_has_the_same_number_of_values():
    found = read_values(None)
    names = [name.partition("/")[2] for name in shipped.names() if name.startswith("method/")]
    assert sorted(found) == sorted(names)
    for name, settings in found.items():
        config = yaml.safe_load(shipped.find(f"method/{name}").read_text())["model"]["method"]
        arguments = inspect.signature(getattr(methods, config["class_path"])).parameters
        assert len(settings) <= 2
        for setting, values in settings.items():
            assert setting in arguments, f"{name} has no {setting}"
            assert len(values) == len(set(values)) == 5
            assert values == sorted(values)


@pytest.mark.slow
def test_the_accuracy_is_that_of_a_fit_and_nothing_is_tested(tmp_path):
    Path("mine.yaml").write_text("ditto: {regularization: [0.1, 3.0]}\nfedavg: {}\n")
    main(["tune", *TUNE, "--search", "mine.yaml", "--split-seeds", "4", "--jobs", "2"])
    with Path("out/runs.csv").open() as file:
        row = list(csv.DictReader(file))[1]
    folder = Path(row["folder"])
    assert not (folder / "test.json").exists()
    options = ["--model.method.init_args.regularization=3.0", "--data.split_seed=4", "--trainer.max_epochs=3"]
    config = ["--config=configs/tiny/ditto.yaml", "--seed_everything=0", "--trainer.check_val_every_n_epoch=3"]
    fit = cli.run(["fit", *config, *options, f"--trainer.default_root_dir={tmp_path / 'alone'}"])
    assert float(row["personalized_accuracy"]) == float(fit.trainer.callback_metrics["val/personalized_accuracy"])
