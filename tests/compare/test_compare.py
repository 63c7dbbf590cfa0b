"""`flow-pl compare` as a user meets it: real runs of tiny configurations, each in its own process."""

import csv
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import pytest
import yaml

from flow_pl.__main__ import main
from tests.test_cli import TINY

pytestmark = pytest.mark.slow

METHODS = {
    "flow": {
        "class_path": "Flow",
        "init_args": {"router": {"class_path": "InstanceRouter", "init_args": {"hidden": [4]}}},
    },
    "fedavg": {"class_path": "FedAvg", "init_args": {}},
}
SEEDS = (0, 1)
OUT = Path("runs", "compare", "tiny")
ALL = ("compare", "--methods", "configs/tiny/*.yaml", "--seeds", *map(str, SEEDS))
ALONE = ("compare", "--methods", "configs/tiny/fedavg.yaml", "--out", "out")


def write_configs(folder, methods=METHODS, **trainer):
    """Tiny configurations in `configs/tiny`, for commands that run in the folder."""
    (folder / "configs" / "tiny").mkdir(parents=True)
    for name, method in methods.items():
        config = yaml.safe_load(TINY.format(root=folder))
        config["trainer"] |= {"max_epochs": 3, "check_val_every_n_epoch": 2, **trainer}
        config["trainer"]["default_root_dir"] = f"runs/{name}"
        config["model"]["method"] = method
        (folder / "configs" / "tiny" / f"{name}.yaml").write_text(yaml.safe_dump(config))


def change(path, old, new):
    path = Path(path)
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def fails(*args):
    with pytest.raises(SystemExit) as stop:
        main([*args])
    return stop.value.code


def table(path):
    with path.open() as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """A folder with a comparison of two methods with two seeds, side by side."""
    folder = tmp_path_factory.mktemp("compared")
    write_configs(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        main([*ALL, "--jobs", "2"])
    return folder


@pytest.fixture
def done(compared, tmp_path, monkeypatch):
    """A copy of it, in the present folder; the folder of its results."""
    for name in ("configs", "runs"):
        shutil.copytree(compared / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path / OUT


def results_of(out, method, seed):
    """The results of a run's test, as its `ResultsTable` wrote them."""
    return json.loads((out / "runs" / method / f"seed{seed}" / "test.json").read_text())


def test_the_table_is_that_of_the_runs(compared):
    out = compared / OUT
    rows = {row["method"]: row for row in table(out / "table.csv")}
    assert list(rows) == ["fedavg", "flow"]
    for method, row in rows.items():
        results = [results_of(out, method, seed)["results"] for seed in SEEDS]
        for population in ("seen", "new"):
            for metric in ("generalized_accuracy", "personalized_accuracy_client_mean", "personalized_accuracy_p10"):
                values = [result[population][metric] for result in results]
                assert float(row[f"{population}/{metric}"]) == pytest.approx(statistics.mean(values))
                assert float(row[f"{population}/{metric}_std"]) == pytest.approx(statistics.stdev(values))
        assert float(row["rounds_per_second"]) > 0
    markdown = (out / "table.md").read_text()
    best = max(float(row["seen/personalized_accuracy"]) for row in rows.values())
    assert f"**{100 * best:.2f} ±" in markdown
    assert "## seen clients (6)" in markdown
    assert "randomization test" in markdown


def test_the_numbers_of_each_seed_are_there(compared):
    out = compared / OUT
    rows = table(out / "runs.csv")
    assert [(row["method"], row["seed"]) for row in rows] == [(m, str(s)) for m in ("fedavg", "flow") for s in SEEDS]
    for row in rows:
        for population, metrics in results_of(out, row["method"], row["seed"])["results"].items():
            for name, value in metrics.items():
                assert row[f"{population}/{name}"] == ("" if value is None else str(value))
        assert row["rounds"] == "3"


def test_figures_are_images(compared):
    out = compared / OUT
    for name in ("curves", "clients", "routes", "accuracy"):
        assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG"), name


def test_a_run_is_what_fit_and_test_do_alone(done, capsys):
    """The same settings and seed without the comparison give the same results to the last digit."""
    main(["fit", "--config", "configs/tiny/flow.yaml", "--seed_everything", "1"])
    options = ["--trainer.callbacks+=ResultsTable", "--trainer.callbacks.path=alone.json"]
    main(["test", "--config", "configs/tiny/flow.yaml", *options, "--ckpt_path", "runs/flow/checkpoints/last.ckpt"])
    assert json.loads(Path("runs/flow/alone.json").read_text()) == results_of(done, "flow", 1)


def test_done_runs_are_skipped_and_changed_ones_run_again(done, capsys):
    before = {path: path.stat().st_mtime_ns for path in done.glob("runs/*/*/results.json")}
    accuracy = results_of(done, "fedavg", 0)["results"]
    change("configs/tiny/fedavg.yaml", "local_epochs: 1", "local_epochs: 2")
    methods = ["configs/tiny/fedavg.yaml", "configs/tiny/flow.yaml"]
    main(["compare", "--methods", *methods, "--seeds", "0", "--allow-different"])
    said = capsys.readouterr().out
    assert "flow, seed 0: done, skipped" in said
    assert "fedavg, seed 0: made with other settings or another version of flow_pl, run again" in said
    assert "run 2 of 2: fedavg, seed 0" in said
    after = {path: path.stat().st_mtime_ns for path in before}
    assert {path.parts[-3] for path in before if after[path] != before[path]} == {"fedavg"}
    assert results_of(done, "fedavg", 0)["results"] != accuracy
    earlier = json.loads((done / "runs" / "fedavg" / "seed0.earlier1" / "results.json").read_text())
    assert earlier["results"] == accuracy
    assert [row["seeds"] for row in table(done / "table.csv")] == ["1", "1"]


def test_options_are_given_to_every_run_and_decide_what_is_done(done, capsys):
    main(["compare", "--methods", "configs/tiny/fedavg.yaml", "--trainer.max_epochs", "1", "--data.cohort_size=2"])
    assert "run again" in capsys.readouterr().out
    settings = yaml.safe_load((done / "runs" / "fedavg" / "seed0" / "config.yaml").read_text())
    assert settings["trainer"]["max_epochs"] == 1
    assert settings["data"]["init_args"]["cohort_size"] == 2
    assert results_of(done, "fedavg", 0)["round"] == 1


def test_another_checkpoint_is_tested_without_training_again(done, capsys):
    """Of three rounds the second alone is validated, and so it is the best."""
    curve = done / "runs" / "fedavg" / "seed0" / "curve.csv"
    trained = curve.stat().st_mtime_ns
    main(["compare", "--methods", "configs/tiny/fedavg.yaml", "--checkpoint", "best"])
    assert "fedavg, seed 0: interrupted, resumed" in capsys.readouterr().out
    assert results_of(done, "fedavg", 0)["round"] == 2
    assert curve.stat().st_mtime_ns == trained


def test_a_fit_that_has_ended_is_only_tested(tmp_path, monkeypatch, capsys):
    """EarlyStopping ends it after 2 of 60 rounds; it goes on neither for a test nor after a kill before the test."""
    monkeypatch.chdir(tmp_path)
    write_configs(tmp_path, {"fedavg": METHODS["fedavg"]}, max_epochs=60)
    early = {"monitor": "val/personalized_accuracy", "stopping_threshold": -1.0, "mode": "max"}
    options = [f"--trainer.callbacks.{name}={value}" for name, value in early.items()]
    args = [*ALONE, "--trainer.callbacks+=EarlyStopping", *options, "--trainer.callbacks+=LearningCurves"]
    folder = tmp_path / "out" / "runs" / "fedavg" / "seed0"
    last = folder / "checkpoints" / "last.ckpt"

    main(args)
    trained, curve = last.read_bytes(), (folder / "curve.csv").read_bytes()
    assert rounds_of(folder) == json.loads((folder / "test.json").read_text())["round"] == 2
    main([*args, "--checkpoint", "best"])
    (folder / "results.json").unlink()
    (folder / "test.json").unlink()
    main(args)
    assert "fedavg, seed 0: interrupted, resumed" in capsys.readouterr().out
    assert (last.read_bytes(), (folder / "curve.csv").read_bytes()) == (trained, curve)
    # another number of rounds is another run
    main([*args, "--trainer.max_epochs", "1"])
    assert json.loads((folder / "test.json").read_text())["round"] == 1


@pytest.mark.parametrize("name", ["clients.csv", pytest.param("curve.csv", marks=pytest.mark.extended)])
def test_a_table_that_was_damaged_is_refused_and_made_again(done, capsys, name):
    """Also one that is shorter by whole rows; what the message says helps."""
    path = done / "runs" / "fedavg" / "seed0" / name
    before = path.read_text().splitlines()
    path.write_text("\n".join(before[:-1]) + "\n")
    command = ("compare", "--methods", "configs/tiny/fedavg.yaml", "--seeds", "0")
    assert fails(*command) == 1
    error = capsys.readouterr().err.replace(f"{Path.cwd()}/", "")
    path = path.relative_to(Path.cwd())
    assert f"{path} was damaged or changed since fedavg, seed 0 wrote it" in error
    doomed = path.parent if name == "curve.csv" else path.with_name("results.json")
    assert f"delete {doomed} and run the same command to create it again" in error
    shutil.rmtree(doomed) if doomed.is_dir() else doomed.unlink()
    main([*command])
    after = path.read_text().splitlines()
    assert len(after) == len(before)
    if name == "clients.csv":  # the other one has times
        assert after == before


def test_a_run_whose_results_are_damaged_is_made_again(done, capsys):
    path = done / "runs" / "fedavg" / "seed0" / "results.json"
    path.write_text(path.read_text()[:-20])
    main(["compare", "--methods", "configs/tiny/fedavg.yaml", "--seeds", "0"])
    assert "fedavg, seed 0: interrupted, resumed" in capsys.readouterr().out
    assert json.loads(path.read_text())["round"] == 3


def test_results_may_be_moved_and_shown_in_part(done, capsys):
    os.rename(done, "elsewhere")
    main([*ALL, "--out", "elsewhere", "--populations", "new"])
    said = capsys.readouterr().out
    assert said.count("done, skipped") == 4
    assert "new clients (2)" in said
    assert "seen clients" not in said


def test_splits_are_runs_of_their_own(tmp_path, monkeypatch, capsys):
    """The one of the task's own seed has the results of a run without the option."""
    monkeypatch.chdir(tmp_path)
    write_configs(tmp_path, {"fedavg": METHODS["fedavg"]}, max_epochs=1, check_val_every_n_epoch=1)
    main([*ALONE, "--split-seeds", "0", "3"])
    assert "run 2 of 2: fedavg, split 3, seed 0" in capsys.readouterr().out
    own, other = (results_of(Path("out"), f"fedavg/split{split}", 0)["results"] for split in (0, 3))
    assert own != other
    main([*ALONE[:-1], "plain"])
    assert results_of(Path("plain"), "fedavg", 0)["results"] == own
    rows = table(Path("out", "runs.csv"))
    assert [(row["split"], row["seed"]) for row in rows] == [("0", "0"), ("3", "0")]
    assert [row["splits"] for row in table(Path("out", "table.csv"))] == ["2"]


ROUNDS = 150
"""So many that a run is not through before it is stopped, however fast the machine."""


def test_what_was_interrupted_goes_on(tmp_path, monkeypatch, capsys, request):
    """Killed after one of two runs, in the middle of the other, then stopped by Ctrl-C: the same results as without."""
    monkeypatch.chdir(tmp_path)
    write_configs(tmp_path, {"fedavg": METHODS["fedavg"]}, max_epochs=ROUNDS)
    args = [*ALONE, "--seeds", "0", "1"]
    second = tmp_path / "out" / "runs" / "fedavg" / "seed1"
    # as shells start what runs in the background; a process hands on what it ignores
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    request.addfinalizer(partial(signal.signal, signal.SIGINT, handler))
    process = subprocess.Popen([sys.executable, "-m", "flow_pl", *args], stdout=subprocess.DEVNULL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    wait_for(lambda: rounds_of(second) >= 2)
    process.kill()
    process.wait()
    # the run stops by itself when the command is no more
    wait_for(lambda: "Detected KeyboardInterrupt" in (second / "log.txt").read_text())
    rounds = rounds_of(second)
    assert 2 <= rounds < ROUNDS

    def press_ctrl_c():
        wait_for(lambda: rounds_of(second) > rounds)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=press_ctrl_c).start()
    assert fails(*args) == 130
    said = capsys.readouterr().out
    assert "fedavg, seed 0: done, skipped" in said
    assert "fedavg, seed 1: interrupted, resumed" in said
    assert "Run the same command again to resume" in said
    assert rounds < rounds_of(second) < ROUNDS
    assert not (second / "results.json").exists()

    main(args)
    assert "fedavg, seed 1: interrupted, resumed" in capsys.readouterr().out
    main([*ALONE[:-1], "whole", "--seeds", "1"])
    for name in ("clients.csv", "test.json"):
        assert (second / name).read_text() == (tmp_path / "whole" / "runs" / "fedavg" / "seed1" / name).read_text()
    assert [row["round"] for row in table(second / "curve.csv")] == [str(number) for number in range(2, ROUNDS + 1, 2)]


def rounds_of(folder):
    """The last round that a run has validated."""
    return int(table(folder / "curve.csv")[-1]["round"]) if (folder / "curve.csv").exists() else 0


def wait_for(condition):
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


THEIRS = """
import os
import signal
from flow_pl.methods import FedAvg

class Raising(FedAvg):
    def training(self):
        raise RuntimeError("this one cannot train")

class Crashing(FedAvg):
    def training(self):
        os.kill(os.getpid(), signal.SIGKILL)
"""


def test_failures_are_reported_and_leave_the_others_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "their_methods.py").write_text(THEIRS)
    bad = {name: {"class_path": f"their_methods.{name.title()}"} for name in ("crashing", "raising")}
    write_configs(tmp_path, bad | METHODS)
    args = ["compare", "--methods", *(f"configs/tiny/{name}.yaml" for name in (*bad, "fedavg")), "--out", "out"]
    assert fails(*args) == 1
    said, error = capsys.readouterr()
    assert "fedavg, seed 0: done" in said
    assert "failed: crashing, seed 0: ended by signal 9" in error
    assert re.search(r"failed: raising, seed 0: .*this one cannot train\n  see .*log.txt", error)
    assert "- raising has 0 of 1 seeds." in (tmp_path / "out" / "table.md").read_text()
    assert [row["method"] for row in table(tmp_path / "out" / "table.csv")] == ["fedavg"]
    assert not (tmp_path / "out" / "routes.png").exists()
    change(tmp_path / "their_methods.py", 'raise RuntimeError("this one cannot train")', "return super().training()")
    assert fails(*args) == 1
    assert "raising, seed 0: interrupted, resumed" in capsys.readouterr().out
    assert [row["method"] for row in table(tmp_path / "out" / "table.csv")] == ["raising", "fedavg"]


def test_runs_on_two_devices(done):
    """Lightning starts the second process of the run, not a second comparison."""
    main([*ALONE, "--trainer.devices", "2", "--trainer.strategy", "ddp"])
    one, two = (table(out / "runs" / "fedavg" / "seed0" / "clients.csv") for out in (done, Path("out")))
    assert two == one
