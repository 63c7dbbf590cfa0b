"""`flow-pl report`: the page of a finished run, and what is refused."""

import csv
from types import SimpleNamespace

import pytest
import yaml

from flow_pl.__main__ import main
from flow_pl.callbacks import RoutingReport
from flow_pl.report.page import NO_CURVE
from flow_pl.results.runs import read_log

FIT = ["fit", "-c", "task/digits", "-c", "method/flow", "--trainer.accelerator=cpu", "--trainer.devices=1"]
SMALL = [
    "--trainer.max_epochs=2",
    "--trainer.check_val_every_n_epoch=1",
    "--data.num_clients=12",
    "--data.cohort_size=4",
]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FLOW_PL_CACHE", str(tmp_path / "cache"))
    return tmp_path


@pytest.mark.slow
def test_a_finished_run_gets_its_page(folder, capsys):
    """Of the run where it lies now, with the curves that its log has; the run's own files stay as they are."""
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    main([*FIT, *SMALL])
    (folder / "runs/digits").rename(folder / "moved")
    before = (folder / "moved/flow/config.yaml").read_text()
    capsys.readouterr()
    main(["report", "moved/flow", "--trainer.callbacks.clients", "4", "--trainer.accelerator=cpu"])
    printed = capsys.readouterr().out
    assert printed.splitlines()[-1] == "report: moved/flow/report.html"
    assert "moved/flow/checkpoints/best.ckpt" in printed
    page = (folder / "moved/flow/report.html").read_text()
    assert 'id="rounds"' in page
    assert NO_CURVE not in page
    assert not (folder / "runs/digits").exists()
    assert (folder / "moved/flow/config.yaml").read_text() == before


@pytest.mark.parametrize("listed", [False, True])
def test_a_run_that_lists_the_callback_has_it_once(folder, monkeypatch, capsys, listed):
    """A run with a page of another name keeps that name; the checkpoint asked for is tested."""
    own = [{"class_path": "flow_pl.callbacks.RoutingReport", "init_args": {"path": "page.html"}}] if listed else None
    (folder / "run").mkdir()
    (folder / "run/config.yaml").write_text(yaml.safe_dump({"model": {}, "trainer": {"callbacks": own}}))
    asked = []

    def fake_run(words):
        asked.extend(words)
        page = RoutingReport(path="page.html" if listed else "report.html")
        return SimpleNamespace(trainer=SimpleNamespace(callbacks=[page], is_global_zero=True))

    monkeypatch.setattr("flow_pl.report_command.run", fake_run)
    main(["report", "run", "--ckpt_path", "x.ckpt", "--data.path=y"])
    added = ["--trainer.callbacks+=RoutingReport"]
    assert [word for word in asked if "RoutingReport" in word] == ([] if listed else added)
    assert asked[0] == "test"
    assert asked[-2:] == ["--ckpt_path=x.ckpt", "--data.path=y"]
    assert capsys.readouterr().out == f"report: run/{'page' if listed else 'report'}.html\n"


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ([], "flow-pl report needs RUN"),
        (["nowhere"], "nowhere is not the folder of a run: it has no config.yaml"),
        (["run"], "neither best.ckpt nor last.ckpt in run/checkpoints"),
        (["run", "--ckpt_pth", "x"], "there is no option --ckpt_pth. Did you mean --ckpt_path?"),
    ],
)
def test_what_cannot_be_reported_gets_one_line(folder, capfd, args, said):
    (folder / "run").mkdir()
    with pytest.raises(SystemExit) as stop:
        main([*FIT, *SMALL, "--print_config"])
    assert stop.value.code == 0
    (folder / "run/config.yaml").write_text(capfd.readouterr().out)
    with pytest.raises(SystemExit) as stop:
        main(["report", *args])
    assert stop.value.code != 0
    errors = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert said in errors[0]


def test_the_log_of_the_last_fit_is_read(tmp_path):
    """A round's two rows are one; the log of a test, and that of an earlier fit, are left alone."""
    logs = {
        9: [{"step": 1, "train/clients": 3, "val/gain": ""}, {"step": 5, "train/clients": 3, "val/gain": 0.9}],
        10: [
            {"step": 2, "train/clients": "", "val/gain": 0.25},
            {"step": 2, "train/clients": 3, "val/gain": ""},
            {"step": 4, "train/clients": "", "val/gain": 0.5},
        ],
        11: [{"step": 0, "test/seen/gain": 0.1}],
    }
    for version, rows in logs.items():
        (tmp_path / f"version_{version}").mkdir()
        with (tmp_path / f"version_{version}/metrics.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0].keys())
            writer.writeheader()
            writer.writerows(rows)
    assert read_log(tmp_path) == {2: {"gain": 0.25}, 4: {"gain": 0.5}}
    assert read_log(tmp_path / "none") == {}
