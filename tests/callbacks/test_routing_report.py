"""The page on a test: of real runs on numbers and text."""

import html
import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import wandb
import yaml

from flow_pl.__main__ import main
from flow_pl.callbacks import RoutingReport
from flow_pl.cli import run
from flow_pl.errors import ConfigurationError
from flow_pl.report.tables import block_table
from tests.data.published_formats import write_leaf
from tests.test_cli import TINY
from tests.wandb_files import offline_runs

BOTH = ["--trainer.callbacks+=LearningCurves", "--trainer.callbacks+=RoutingReport"]
NASTY = "<i>&nbsp;"
TEXTS = ["to be or not to be", "that is the question", "whether it is nobler <b>in</b> the mind to suffer"]


def command(folder, subcommand, *options, **sections):
    """A command of a tiny run in a folder, with some sections of its configuration replaced."""
    settings = yaml.safe_load(TINY.format(root=folder))
    settings = {**settings, **{name: {**settings[name], **changed} for name, changed in sections.items()}}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(settings))
    words = ["--config", str(folder / "tiny.yaml")]
    if subcommand == "test" and not (folder / "run" / "checkpoints").exists():
        run(["fit", *words, *(str(option) for option in options if str(option).startswith(("--data", "--model")))])
    return run([subcommand, *words, *map(str, options)])


def reported(folder, *options, **sections):
    """Fit and test with the report; returns the finished command of the test and the page."""
    command(folder, "fit", *BOTH, *options, **sections)
    last = folder / "run" / "checkpoints" / "last.ckpt"
    cli = command(folder, "test", *BOTH, *options, "--ckpt_path", last, **sections)
    return cli, (folder / "run" / "report.html").read_text()


def backbone(class_path, **settings):
    return {"class_path": class_path, "init_args": settings}


def figure_names(folder):
    return {path.stem for path in (folder / "run" / "figures").glob("*")}


class Keeping(RoutingReport):
    """Keeps what was found out."""

    def report(self, trainer, pl_module, rounds, results):
        self.kept = self.evidence
        super().report(trainer, pl_module, rounds, results)


def looked_at(folder, *options, **settings):
    """The evidence of a test on numbers, and the metrics of the test."""
    keeping = {"class_path": "tests.callbacks.test_routing_report.Keeping", "init_args": settings}
    cli = command(folder, "test", *options, "--trainer.callbacks", json.dumps([keeping]))
    (report,) = (callback for callback in cli.trainer.callbacks if isinstance(callback, Keeping))
    return report.kept, {name: float(value) for name, value in cli.trainer.callback_metrics.items()}


@pytest.mark.slow
@pytest.mark.parametrize("chunk_size", [pytest.param(2, marks=pytest.mark.extended), 10])
def test_routes_are_those_of_the_test(tmp_path, chunk_size):
    """Dropout included: personalized once more, clients route as they were tested."""
    evidence, metrics = looked_at(tmp_path, f"--data.chunk_size={chunk_size}")
    for population, routes in evidence.routes.items():
        expected = [metrics[f"test/{population}/routed_local/{block}"] for block in evidence.blocks]
        assert routes.share.tolist() == pytest.approx(expected)
        shown = evidence.comparison.methods["Flow"][0].populations[population]
        assert list(shown.values()) == pytest.approx(expected), "the figure by block"
        assert len(routes.clients) == len(evidence.clients[population])
    gains = [client.personalized - client.generalized for client in evidence.clients["seen"]]
    assert np.mean(gains) == pytest.approx(metrics["test/seen/gain_client_mean"])


@pytest.mark.slow
def test_some_clients_are_looked_at_in_whole_chunks_of_all_sizes(tmp_path):
    """Six seen clients in chunks of one, by decreasing size: the first, the third and the fifth."""
    evidence, _ = looked_at(tmp_path, "--data.chunk_size=1", clients=3, common=0)
    assert len(evidence.routes["seen"].clients) == 3
    assert len(evidence.clients["seen"]) == 6
    sizes = {client.name: client.examples for client in evidence.clients["seen"]}
    chosen = [sizes[evidence.names[client.client]] for client in evidence.routes["seen"].clients]
    assert chosen == sorted(sizes.values(), reverse=True)[::2]
    assert evidence.agreement is None


@pytest.mark.slow
def test_a_router_that_is_not_adapted_agrees_with_itself(tmp_path):
    """It sees the instance alone, and so says the same for every client."""
    evidence, _ = looked_at(tmp_path, "--model.method.adapt_router=false")
    assert evidence.agreement.same == pytest.approx([1, 1])
    assert evidence.agreement.difference == pytest.approx([0, 0])
    table = block_table(evidence)
    assert [row[table.columns.index("agreement, pairs of clients")] for row in table.rows] == [1, 1]


@pytest.mark.slow
def test_one_way_per_client_is_explained_by_the_client(tmp_path):
    evidence, _ = looked_at(tmp_path, "--model.method.route_by=client")
    by_client, by_instance = evidence.all_routes.explained
    assert by_instance == pytest.approx([0, 0], abs=1e-9)
    assert (by_client > 1e-9).all()


@pytest.mark.slow
def test_two_processes_write_the_page_of_one(tmp_path):
    """Dropout included; pictures aside, where the last bit may show."""
    settings = yaml.safe_load(TINY.format(root=tmp_path))
    pages = {}
    (tmp_path / "fit.yaml").write_text(yaml.safe_dump(settings))
    main(["fit", "--config", str(tmp_path / "fit.yaml")])
    trained = ["--ckpt_path", str(tmp_path / "run" / "checkpoints" / "last.ckpt")]
    for processes in (1, 2):
        settings["trainer"] |= {"default_root_dir": str(tmp_path / str(processes)), "devices": processes}
        settings["trainer"]["strategy"] = "ddp" if processes == 2 else "auto"
        path = tmp_path / f"{processes}.yaml"
        path.write_text(yaml.safe_dump(settings))
        words = [sys.executable, "-m", "flow_pl", "test", "--config", str(path), "--trainer.callbacks+=RoutingReport"]
        done = subprocess.run([*words, *trained], capture_output=True, text=True, timeout=300, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        page = (tmp_path / str(processes) / "report.html").read_text()
        pages[processes] = re.sub(r'src="[^"]*"', "", page)
    assert pages[1].count("<img") > 8
    assert pages[1] == pages[2]


@pytest.mark.slow
def test_a_method_without_routes_has_its_clients_alone(tmp_path):
    model = {"method": {"class_path": "FineTuning", "init_args": {}}}
    _, page = reported(tmp_path, model={**yaml.safe_load(TINY.format(root=tmp_path))["model"], **model})
    assert re.findall(r'<section id="(\w+)"', page) == ["rounds", "results", "clients"]
    assert figure_names(tmp_path) == {"curves", "gains", "clients", "ranks", "sizes"}


@pytest.mark.slow
def test_a_fit_without_its_log_is_told_how_to_have_curves(tmp_path):
    """They are those of the CSV log, where there is one."""
    command(tmp_path, "test", "--trainer.callbacks+=RoutingReport")
    assert "curves" in figure_names(tmp_path)
    for log in (tmp_path / "run" / "logs").glob("*/metrics.csv"):
        log.unlink()
    shutil.rmtree(tmp_path / "run" / "figures")
    command(tmp_path, "test", "--trainer.callbacks+=RoutingReport")
    page = (tmp_path / "run" / "report.html").read_text()
    assert "add the callback LearningCurves" in page
    assert "curves" not in figure_names(tmp_path)


def texts(folder):
    """Roles with lines, the name of one being no HTML, and a character model."""
    users = {name: {"x": TEXTS * 3} for name in ("a", "b", "c", "d", NASTY)}
    data = {
        "class_path": "LeafData",
        "init_args": {
            "train": str(write_leaf(folder / "train.json", users)),
            "encoding": {"class_path": "NextCharacter", "init_args": {"text": "x", "length": 12, "characters": None}},
            "cohort_size": 2,
            "new_client_fraction": 0.2,
            "cache_dir": str(folder / "cache"),
        },
    }
    router = backbone("SequenceRouter", hidden=[4], hidden_behind=[4])
    model = {
        "backbone": backbone("NextCharacterLSTM", num_tokens=90, embedding=3, hidden=4),
        "objective": "NextToken",
        "method": {"class_path": "Flow", "init_args": {"router": router}},
    }
    return {"data": data, "model": model}


@pytest.mark.slow
def test_text_is_shown_by_its_tokens(tmp_path):
    _, page = reported(tmp_path, **texts(tmp_path))
    assert {"instances_local", "instances_global"} < figure_names(tmp_path)
    lines = [
        "".join(re.findall(r"<span style=\"background:#[0-9a-f]{6}\">([^<]*)</span>", found)).replace("␣", " ")
        for found in re.findall(r'<div class="tokens">(.*?)</div>', page)
    ]
    assert len(lines) == 2 * 12
    shown = [html.unescape(line) for line in lines]
    assert all(any(line.removeprefix("<bos>") in text for text in TEXTS) for line in shown)
    assert any("<b>" in line or "b>" in line for line in shown), "text of the data that looks like HTML"
    assert NASTY not in page
    assert html.escape(NASTY) in page


@pytest.mark.slow
def test_each_of_several_labels_is_a_class(tmp_path):
    """Four labels of zeros and ones in the user's own file."""
    random = np.random.default_rng(0)
    x, y = random.normal(size=(80, 6)).astype("float32"), (random.random((80, 4)) < 0.5).astype("float32")
    np.savez(tmp_path / "tags.npz", x=x, y=y, client=np.repeat(np.arange(8), 10))
    settings = {"path": str(tmp_path / "tags.npz"), "cohort_size": 3, "cache_dir": str(tmp_path / "arrays")}
    data = {"class_path": "ArrayData", "init_args": settings}
    model = {
        "backbone": backbone("MLP", in_features=6, num_classes=4, hidden=[5]),
        "objective": backbone("MultiLabel", k=2),
    }
    _, page = reported(tmp_path, data=data, model=model)
    assert "Routes" in page
    assert "route_classes" in figure_names(tmp_path)


@pytest.mark.slow
def test_tables_and_figures_reach_wandb(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.delenv("WANDB_RUN_ID", raising=False)
    logger = ["--trainer.logger=WandbLogger", f"--trainer.logger.save_dir={tmp_path}", "--trainer.logger.offline=true"]
    try:
        command(tmp_path, "test", *BOTH, *logger)
    finally:
        wandb.finish()
    (logged,) = offline_runs(tmp_path)
    tables = {}
    for name in ("clients", "blocks", "classes"):
        (row,) = logged.rows(f"report/{name}/path")
        tables[name] = json.loads((logged.folder / "files" / row[f"report/{name}/path"]).read_text())
    assert len(tables["clients"]["data"]) == 8
    assert [row[0] for row in tables["blocks"]["data"]] == ["linear1", "head"]
    assert tables["classes"]["columns"] == ["class", "decisions", "linear1", "head"]
    for figure in ("gains", "route_probabilities", "instances_local"):
        assert logged.rows(f"figures/{figure}/filenames"), figure


def test_unusable_settings_are_refused(tmp_path, monkeypatch, capsys):
    for settings in ({"path": "report.pdf"}, {"clients": 0}, {"common": -1}, {"instances": 0}):
        with pytest.raises(ConfigurationError):
            RoutingReport(**settings)
    config = tmp_path / "tiny.yaml"
    config.write_text(TINY.format(root=tmp_path))
    main(["fit", "--config", str(config)])
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit):
        main(["test", "--config", str(config), "--trainer.callbacks+=RoutingReport"])
    assert "RoutingReport needs matplotlib" in capsys.readouterr().err
