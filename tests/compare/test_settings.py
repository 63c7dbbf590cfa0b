"""What the command refuses before it runs anything, and what it makes of configurations."""

import copy
import json
from pathlib import Path

import pytest
from lightning.pytorch.callbacks import EMAWeightAveraging

from flow_pl.compare.options import find_reference
from flow_pl.compare.run_options import comparison_name
from flow_pl.compare.runs import Run, check_same_data
from flow_pl.compare.settings import budgets, check_comparable, resolve, run_settings, with_split
from flow_pl.compare.testable import check_testable
from flow_pl.errors import ConfigurationError
from flow_pl.shipped import find
from tests.compare.test_compare import METHODS, change, fails, write_configs
from tests.test_cli import fails as fails_saying

FEDAVG, FLOW = Path("configs/tiny/fedavg.yaml"), Path("configs/tiny/flow.yaml")
BEST = ("--methods", str(FLOW), "--checkpoint", "best")


@pytest.fixture(autouse=True)
def _configs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_configs(tmp_path, METHODS | {"local": {"class_path": "Local", "init_args": {"epochs": 2}}})


DIFFERENT = {
    ("cohort_size: 3", "cohort_size: 2"): ["data.cohort_size: 2 in fedavg; 3 in flow"],
    ("num_clients: 8", "num_clients: 9"): ["data.num_clients: 9 in fedavg; 8 in flow"],
    ("max_epochs: 3", "max_epochs: 4"): ["trainer.max_epochs: 4 in fedavg; 3 in flow"],
    ("check_val_every_n_epoch: 2", "check_val_every_n_epoch: 1"): ["trainer.check_val_every_n_epoch: 1 in fedavg"],
    ("local_epochs: 1", "local_epochs: 2\n      personal_epochs: 3"): [
        "model.loop.local_epochs: 2 in fedavg; 1 in flow",
        "model.loop.personal_epochs: 3 in fedavg; 1 in",
    ],
    (
        "batch_size: 4",
        "batch_size: 5\n      weighting: uniform\n"
        "      client_optimizer: {class_path: torch.optim.SGD, init_args: {lr: 0.2, momentum: 0.9}}\n"
        "      client_scheduler: {class_path: torch.optim.lr_scheduler.StepLR, init_args: {step_size: 1}}",
    ): [
        'model.loop.client_scheduler: "torch.optim.lr_scheduler.StepLR" in fedavg; null in flow',
        "model.loop.batch_size: 5 in fedavg; 4 in flow",
        'model.loop.weighting: "uniform" in fedavg; "exam',
        "model.loop.client_optimizer.lr: 0.2 in fedavg; 0.05 in flow",
    ],
    (
        "  loop:",
        "  server_optimizer: {class_path: torch.optim.SGD, init_args: {lr: 0.5}}\n"
        "  server_scheduler: {class_path: torch.optim.lr_scheduler.StepLR, init_args: {step_size: 1}}\n  loop:",
    ): [
        "model.server_optimizer.lr: 0.5 in fedavg; 1.0 in flow",
        'model.server_scheduler: "torch.optim.lr_scheduler.StepLR" in fedavg; null in flow',
    ],
    ("- 5", "- 6"): ['"hidden": [6]'],
}
ADAM = "batch_size: 4\n      client_optimizer: {class_path: torch.optim.Adam, init_args: {lr: 0.05}}"
OPTIMIZERS = {
    ("batch_size: 4", ADAM): ['loop.client_optimizer: "torch.optim.Adam" in fedavg; "torch.optim.SGD" in flow']
}


@pytest.mark.parametrize(
    "changes", [DIFFERENT, pytest.param(OPTIMIZERS, marks=pytest.mark.slow)], ids=["all", "optimizer"]
)
def test_what_must_be_equal_is_told_in_one_message(capsys, changes):
    for old, new in changes:
        change(FEDAVG, old, new)
    code, error = fails_saying(capsys, "compare", "--methods", FEDAVG, FLOW)
    assert code == 1
    lines = [line for line in error.splitlines() if line.startswith("  ")]
    expected = [line for lines in changes.values() for line in lines]
    assert len(lines) == len(expected), "nothing but what was changed"
    for line in expected:
        assert sum(line in told for told in lines) == 1, line
    assert "--allow-different" in error
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("cohort_size: 3", "cohort_size: 3\n    chunk_size: 1"),
        pytest.param("batch_size: 4", "batch_size: 4\n      trace_after: null", marks=pytest.mark.slow),
        pytest.param("seed_everything: 1", "seed_everything: 7", marks=pytest.mark.slow),
    ],
)
def test_what_a_method_may_have_of_its_own(old, new):
    change(FEDAVG, old, new)
    assert not check_comparable({path.stem: resolve([path], []) for path in (FEDAVG, FLOW)})


def test_the_rounds_of_a_method_that_sends_nothing_do_not_matter():
    local = Path("configs/tiny/local.yaml")
    change(local, "max_epochs: 3", "max_epochs: 1")
    settings = {path.stem: resolve([path], []) for path in (local, FEDAVG, FLOW)}
    assert not check_comparable(settings)
    change(local, "cohort_size: 3", "cohort_size: 2")
    settings["local"] = resolve([local], [])
    assert check_comparable(settings) == "  data.cohort_size: 2 in local; 3 in fedavg, flow"


def average(decay: float = 0.5) -> EMAWeightAveraging:
    """A callback given by a function, which a fit refuses."""
    return EMAWeightAveraging(decay=decay)


def test_a_function_that_a_fit_refuses_is_refused_before_any_run():
    with pytest.raises(ConfigurationError, match=r"class_path is .*average, which is not a class"):
        resolve([FLOW], [f"--trainer.callbacks={__name__}.average"])


def test_an_average_of_the_server_must_be_common_to_all():
    """Callbacks that only look need not be."""
    looking, averaged = "--trainer.callbacks=RoutingReport", "--trainer.callbacks=EMAWeightAveraging"
    settings = {"fedavg": resolve([FEDAVG], []), "flow": resolve([FLOW], [looking])}
    assert not check_comparable(settings)
    settings["flow"] = resolve([FLOW], [averaged, "--trainer.callbacks.decay=0.5"])
    told = check_comparable(settings)
    assert told.startswith("  trainer.callbacks: [] in fedavg; [{")
    assert '"decay": 0.5' in told
    assert told.endswith("in flow")
    settings["fedavg"] = settings["flow"]
    assert not check_comparable(settings)


def test_what_ends_a_fit_must_be_common_to_all():
    early = ["--trainer.callbacks=EarlyStopping", "--trainer.callbacks.monitor=val/personalized_accuracy"]
    for options in (early, ["--trainer.callbacks=Timer", "--trainer.callbacks.duration=00:00:01:00"]):
        settings = {"fedavg": resolve([FEDAVG], []), "flow": resolve([FLOW], options)}
        told = check_comparable(settings)
        assert told.startswith("  trainer.callbacks: [] in fedavg; [{")
        name = options[0].rpartition("=")[2]
        assert budgets(settings) == {"fedavg": "callbacks none", "flow": f"callbacks {name}"}
        settings["fedavg"] = resolve([FEDAVG], options)
        assert not check_comparable(settings)


def test_a_learning_rate_of_any_name_is_part_of_the_budget():
    options = ["--model.method=PerFedAvg", "--model.method.alpha=0.2"]
    assert budgets({"per_fedavg": resolve([FEDAVG], options)}) == {"per_fedavg": "alpha 0.2"}
    # elsewhere, alpha is no learning rate
    assert budgets({"apfl": resolve([FEDAVG], ["--model.method=APFL"])}) == {"apfl": ""}


def test_what_only_some_methods_train_with_is_told():
    local = Path("configs/tiny/local.yaml")
    change(local, "max_epochs: 3", "max_epochs: 1")
    change(FLOW, "local_epochs: 1", "local_epochs: 2")
    settings = {path.stem: resolve([path], ["--model.method.personal_lr_scale=0.5"]) for path in (local, FLOW)}
    settings["fedavg"] = resolve([FEDAVG], [])
    told = budgets(settings)
    assert told["local"] == "epochs 2, personal_lr_scale 0.5, personal_epochs 1"
    assert told["flow"] == "personal_lr_scale 0.5, personal_epochs 2, local_epochs 2"
    assert told["fedavg"] == "personal_epochs 1, local_epochs 1"


def test_rounds_that_are_another_methods_are_told():
    """LG-FedAvg's first rounds, where it has any, are FedAvg's."""
    for rounds, said in ((0, ""), (2, "pretrain_rounds 2")):
        options = ["--model.method=LGFedAvg", f"--model.method.pretrain_rounds={rounds}"]
        assert budgets({"lg_fedavg": resolve([FEDAVG], options)}) == {"lg_fedavg": said}


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--methods", "nowhere.yaml"], "there is no configuration nowhere.yaml"),
        (["--methods", "configs/none/*.yaml"], "matches no file"),
        (["--methods", str(FLOW), "--seeds", "1", "1"], "expected distinct seeds"),
        (["--methods", str(FLOW), "--split-seeds", "2", "2"], "--split-seeds is [2, 2], expected distinct seeds"),
        (["--methods", str(FLOW), "--split-seeds", "-1"], "--split-seeds is -1"),
        (["--methods", str(FLOW), "--seeds", "-1"], "--seeds is -1"),
        (["--methods", str(FLOW), "--seeds", "4294967296"], "--seeds is 4294967296, expected less than 2^32"),
        (["--methods", str(FLOW), "--populations", "old"], "--populations is old, expected 'seen' or 'new'"),
        (["--methods", str(FLOW), "--split-seeds", "1", "--data.split_seed", "2"], "both given"),
        (["--methods", str(FLOW), "--reference", "ditto"], "--reference is ditto, expected one of --methods: flow"),
        (["--methods", str(FLOW), "--jobs", "0"], "jobs is 0"),
        (["--methods", str(FLOW), "--seed_everything", "1"], "use --seeds"),
        (["--methods", str(FLOW), "--trainer.default_root_dir=x"], "use --out"),
        (["--methods", str(FLOW), "--model.method.no_such_setting", "1"], "no_such_setting"),
        (["--methods", str(FLOW), "--trainer.enable_checkpointing=false"], "enable_checkpointing is false"),
        (["--methods", str(FLOW), "--trainer.fast_dev_run=2"], "trainer.fast_dev_run is 2"),
        (["--methods", str(FLOW), "--trainer.barebones=true"], "trainer.barebones is True"),
        (["--methods", str(FLOW), "--trainer.limit_test_batches=0"], "nothing would be tested"),
        (["--methods", str(FLOW), "--trainer.limit_train_batches=0"], "nothing would be trained"),
        (["--methods", str(FLOW), "--trainer.max_epochs=0"], "flow cannot be compared: it has 0 rounds"),
        (["--methods", str(FLOW), "--trainer.max_steps=0"], "flow cannot be compared: it has 0 rounds"),
        ([*BEST, "--trainer.limit_val_batches=0"], "trainer.limit_val_batches is 0"),
        ([*BEST, "--trainer.max_epochs=1"], "it has 1 round with a validation every 2"),
        (["--methods", str(FLOW), "--out", str(FLOW)], "cannot be created"),
        (["--methods", str(FLOW), "copy/flow.yaml"], "would both be called flow"),
        (["--methods", str(FLOW), "copy/other.yaml"], "choose the output folder with --out"),
    ],
)
def test_bad_options_end_with_one_clear_message(capsys, args, message):
    Path("copy").mkdir()
    for name in ("flow", "other"):
        Path("copy", f"{name}.yaml").write_text(FLOW.read_text())
    code, error = fails_saying(capsys, "compare", *args)
    assert code == 1
    assert message in error
    assert "Traceback" not in error


def test_files_of_others_are_not_touched(capsys):
    mine = Path("out/runs/flow/seed0/thesis.txt")
    mine.parent.mkdir(parents=True)
    mine.write_text("years of work")
    code, error = fails_saying(capsys, "compare", "--methods", FLOW, "--out", "out")
    assert (code, mine.read_text()) == (1, "years of work")
    assert "choose another folder with --out" in error


def test_a_missing_package_is_told_before_anything_runs(capsys, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    code, error = fails_saying(capsys, "compare", "--methods", FLOW)
    assert code == 1
    assert 'pip install "matplotlib>=' in error


def test_the_best_round_of_a_method_without_rounds_is_its_only_one():
    """`Local` trains nothing in rounds, and is validated once, whatever the interval."""
    interval = ["--trainer.max_epochs=1", "--trainer.check_val_every_n_epoch=5"]
    check_testable({"local": resolve([Path("configs/tiny/local.yaml")], interval)}, "best")
    fedavg = {"fedavg": resolve([FEDAVG], interval)}
    check_testable(fedavg, "last")
    with pytest.raises(ConfigurationError, match="1 round with a validation every 5"):
        check_testable(fedavg, "best")


def test_help(capsys):
    for args, words in ((["compare", "--help"], "--allow-different"), (["--help"], "  compare ")):
        assert fails(*args) == 0
        assert words in capsys.readouterr().out


def test_names_of_comparisons():
    here = Path.cwd()
    assert comparison_name([], [here / "mine" / "flow.yaml", here / "mine" / "ditto.yaml"]) == "mine"
    assert (
        comparison_name([find("task/digits")], [here / "mine" / "flow.yaml", here / "yours" / "flow.yaml"]) == "digits"
    )


def test_settings_of_a_run(tmp_path):
    """Callbacks of the configuration stay; loggers of W&B get the names that they were not given."""
    options = ["--trainer.callbacks+=LearningRateMonitor", "--trainer.logger=WandbLogger", "--trainer.logger.project=p"]
    settings = run_settings(resolve([FLOW], options), "flow-seed7", 7, tmp_path, "tiny")
    classes = [callback["class_path"].rpartition(".")[2] for callback in settings["trainer"]["callbacks"]]
    assert classes == ["LearningRateMonitor", "LearningCurves", "ClientResults", "ResultsTable"]
    logger = settings["trainer"]["logger"]["init_args"]
    assert (logger["name"], logger["group"], logger["project"]) == ("flow-seed7", "tiny", "p")
    assert settings["seed_everything"] == 7


@pytest.mark.parametrize("figure", [None, "figures/mine.png"])
def test_listed_learning_curves_are_those_of_the_run(tmp_path, figure):
    """A trainer refuses two of them."""
    options = ["--trainer.callbacks+=LearningCurves", "--trainer.callbacks.path=mine.csv"]
    options += [f"--trainer.callbacks.figure={figure or 'null'}", "--trainer.callbacks+=LearningRateMonitor"]
    settings = run_settings(resolve([FLOW], options), "flow-seed7", 7, tmp_path, "tiny")
    classes = [callback["class_path"].rpartition(".")[2] for callback in settings["trainer"]["callbacks"]]
    assert classes == ["LearningRateMonitor", "LearningCurves", "ClientResults", "ResultsTable"]
    assert settings["trainer"]["callbacks"][1]["init_args"] == {"path": "curve.csv", "figure": figure}


def test_the_digest_is_of_what_decides_the_numbers(tmp_path):
    settings = resolve([FLOW], [])

    def digest(seed=0, folder="a", data=(), loop=(), **trainer):
        changed = copy.deepcopy(settings)
        changed["trainer"] |= trainer
        changed["data"]["init_args"] |= dict(data)
        changed["model"]["loop"]["init_args"] |= dict(loop)
        return Run("flow", seed, tmp_path / folder, changed, "last", "tiny").digest

    assert digest() == digest(folder="b") == digest(default_root_dir="elsewhere")
    assert digest() == digest(data={"chunk_size": 3, "num_workers": 2}, loop={"trace_after": 9}, logger=False)
    others = digest(seed=1), digest(max_epochs=9), digest(data={"cohort_size": 7}), digest(loop={"batch_size": 7})
    assert len({digest(), *others}) == 5


def test_runs_of_data_that_changed_are_not_compared(tmp_path):
    """A file that was written again has the same name: only the rows tell."""
    settings = resolve([FLOW], [])

    def done(method, rows, split=0):
        run = Run(method, 0, tmp_path / f"{method}{split}", with_split(settings, split), "last", "tiny", split)
        run.folder.mkdir(exist_ok=True)
        data = {} if rows is None else {"data": {"rows": rows, "split": f"s{split}"}}
        run.folder.joinpath("results.json").write_text(json.dumps(data))
        return run

    before = done("fedavg", "a")
    check_same_data([before, done("flow", "a"), done("fedavg", "a", split=1), done("ditto", None)])
    with pytest.raises(ConfigurationError, match="fedavg, split 0, seed 0 had other rows or another split than flow"):
        check_same_data([before, done("flow", "b")])


def test_another_split_changes_what_divides_the_rows_and_nothing_else():
    """The seed of the split, and of a partitioner that draws."""
    settings = resolve([find("task/cifar10_npz"), find("method/fedavg")], [])
    other = with_split(settings, 5)
    data = other["data"]["init_args"]
    assert (data["split_seed"], data["partitioner"]["init_args"]["seed"]) == (5, 5)
    data["split_seed"] = data["partitioner"]["init_args"]["seed"] = 0
    assert other == settings


def test_data_without_a_seed_of_the_split_are_refused():
    settings = resolve([FEDAVG], [])
    del settings["data"]["init_args"]["split_seed"]
    with pytest.raises(ConfigurationError, match=r"SyntheticData has no argument split_seed"):
        with_split(settings, 1)


def test_the_reference_is_the_control_unless_another_is_named():
    assert find_reference(None, ["fedavg", "interpolation_votes"]) == "interpolation_votes"
    assert find_reference("fedavg", ["fedavg", "interpolation_votes"]) == "fedavg"
    assert find_reference(None, ["fedavg", "flow"]) is None


def test_a_setting_that_cannot_be_parsed_names_its_file():
    FLOW.write_text(FLOW.read_text().replace("class_path: Flow", "class_path: NoSuchMethod"))
    with pytest.raises(ConfigurationError, match=r"configs/tiny/flow\.yaml.*"):
        resolve([FLOW], [])
