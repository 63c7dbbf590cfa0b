"""The table of a test, on the screen and in a file."""

import csv
import io
import json
from pathlib import Path

import pytest
import rich
from rich.console import Console

from flow_pl.callbacks import (
    GeneralizedAccuracy,
    PersonalizationGain,
    PersonalizedAccuracy,
    ResultsTable,
    RoutingStatistics,
)
from flow_pl.errors import ConfigurationError
from flow_pl.tasks import NextToken
from tests.callbacks.fakes import FakeData, FakeModule, evaluation_chunk, make_trainer

SEEN = [evaluation_chunk([(4, 2, 3, 1, 4, 1, 2), (2, 0, 0, 0, 0, 2, 0)], blocks=2)]
NEW = [evaluation_chunk([(2, 2, 1, 1, 2, 0, 0)], blocks=2)]


@pytest.fixture
def console(monkeypatch: pytest.MonkeyPatch) -> Console:
    console = Console(record=True, width=100, file=io.StringIO())
    monkeypatch.setattr(rich, "_console", console)
    return console


def lines(console: Console) -> list[list[str]]:
    """Cells of the printed rows."""
    text = console.export_text()
    return [[cell.strip() for cell in line.strip("│").split("│")] for line in text.splitlines() if "│" in line]


def test_table_of_two_populations(console: Console, capsys: pytest.CaptureFixture[str]) -> None:
    measures = [GeneralizedAccuracy(), PersonalizedAccuracy(), PersonalizationGain(), RoutingStatistics()]
    trainer = make_trainer(ResultsTable(rows="all"), *measures)
    trainer.test(FakeModule(("conv1", "head")), datamodule=FakeData([], seen=SEEN, new=NEW))
    text = console.export_text(clear=False)
    assert "Flow with MLP, round 0" in text
    assert lines(console) == [
        ["Generalized accuracy", "", ""],
        ["over examples", "33.33", "100.00"],
        ["mean over clients", "25.00", "100.00"],
        ["10th percentile of clients", "5.00", "100.00"],
        ["worst tenth of clients", "0.00", "100.00"],
        ["standard deviation of clients", "25.00", "0.00"],
        ["Gini coefficient of clients", "50.00", "0.00"],
        ["Personalized accuracy", "", ""],
        ["over examples", "50.00", "50.00"],
        ["mean over clients", "37.50", "50.00"],
        ["10th percentile of clients", "7.50", "50.00"],
        ["worst tenth of clients", "0.00", "50.00"],
        ["standard deviation of clients", "37.50", "0.00"],
        ["Gini coefficient of clients", "50.00", "0.00"],
        ["Gain of personalization", "", ""],
        ["over examples", "+16.67", "-50.00"],
        ["mean over clients", "+12.50", "-50.00"],
        ["best fixed mixture", "50.00", "100.00"],
        ["over the best fixed mixture", "+0.00", "-50.00"],
        ["global or local model right", "66.67", "100.00"],
        ["Clients", "", ""],
        ["helped", "50.00", "0.00"],
        ["unchanged", "50.00", "0.00"],
        ["harmed", "0.00", "100.00"],
        ["Routed local", "", ""],
        ["all blocks", "41.67", "0.00"],
        ["conv1", "50.00", "0.00"],
        ["head", "33.33", "0.00"],
    ]
    assert "test/seen" not in capsys.readouterr().out  # the trainer's own list of metrics


def test_rows_without_a_figure_are_left_out(console: Console) -> None:
    trainer = make_trainer(GeneralizedAccuracy(), ResultsTable(rows="all"))
    trainer.test(FakeModule(), datamodule=FakeData([], seen=SEEN))
    assert [row[0] for row in lines(console)] == [
        "Generalized accuracy",
        "over examples",
        "mean over clients",
        "10th percentile of clients",
        "worst tenth of clients",
        "standard deviation of clients",
        "Gini coefficient of clients",
    ]


def test_a_second_accuracy_has_a_row(console: Console) -> None:
    chunk = evaluation_chunk([(4, 2, 3, 1, 4)], subset=[(3, 1, 2)])
    trainer = make_trainer(GeneralizedAccuracy(), PersonalizedAccuracy(), ResultsTable(rows="all"))
    trainer.test(FakeModule(objective=NextToken()), datamodule=FakeData([], seen=[chunk]))
    assert [row[1] for row in lines(console) if row[0] == "without OOV and EOS"] == ["33.33", "66.67"]


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_round_is_that_of_the_checkpoint(console: Console, tmp_path: Path) -> None:
    module, data = FakeModule(), FakeData(SEEN, seen=SEEN)
    make_trainer(max_epochs=3, enable_checkpointing=True, default_root_dir=tmp_path).fit(module, datamodule=data)
    checkpoint = next(tmp_path.rglob("*.ckpt"))
    trainer = make_trainer(GeneralizedAccuracy(), ResultsTable())
    trainer.test(FakeModule(), datamodule=data, ckpt_path=checkpoint, weights_only=False)
    assert "Flow with MLP, round 3" in console.export_text()


@pytest.mark.parametrize("ending", [".json", ".csv"])
def test_every_metric_is_written(console: Console, tmp_path: Path, ending: str) -> None:
    path = tmp_path / "new folder" / f"results{ending}"
    trainer = make_trainer(PersonalizationGain(), ResultsTable(str(path)))
    trainer.test(FakeModule(), datamodule=FakeData([], seen=SEEN, new=NEW))
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    if ending == ".json":
        written = json.loads(path.read_text())
        assert (written["method"], written["backbone"], written["round"]) == ("Flow", "MLP", 0)
        assert written["data"] == {"rows": "rows", "split": "split"}
        assert written["results"]["seen"]["gain"] == pytest.approx(1 / 6)
        assert written["results"]["new"]["gain_over_mixture"] == -0.5
    else:
        rows = {row["metric"]: row for row in csv.DictReader(path.open())}
        assert float(rows["gain"]["seen"]) == pytest.approx(1 / 6)
        assert rows["gain_over_mixture"]["new"] == "-0.5"


def test_unusable_paths_are_refused_before_the_test(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"expected a name that ends in \.csv or \.json"):
        ResultsTable("results.txt")
    (tmp_path / "file").touch()
    trainer = make_trainer(ResultsTable(str(tmp_path / "file" / "results.csv")))
    with pytest.raises(ConfigurationError, match="cannot be written"):
        trainer.test(FakeModule(), datamodule=FakeData([], seen=SEEN))
