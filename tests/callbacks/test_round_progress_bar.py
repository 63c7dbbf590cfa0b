"""What is shown of a run, on a terminal and without one."""

import io
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import rich
from rich.console import Console

from flow_pl.callbacks import GeneralizedAccuracy, PersonalizedAccuracy, RoundProgressBar
from flow_pl.callbacks._progress_display import ProgressDisplay
from flow_pl.callbacks.round_progress_bar import served_clients
from flow_pl.data import CohortSampler
from flow_pl.errors import ConfigurationError
from tests.callbacks.fakes import FakeData, FakeModule, evaluation_chunk, make_trainer

CHUNKS = [evaluation_chunk([(4, 2, 3, 1, 4), (2, 0, 0, 0, 0)]), evaluation_chunk([(2, 1, 1, 1, 1), (2, 2, 2, 2, 2)])]


@pytest.fixture(params=["plain"])
def output(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """What the console gets."""
    stream = io.StringIO()
    live = request.param == "terminal"
    monkeypatch.setattr(
        rich, "_console", Console(file=stream, force_terminal=live, width=120, _environ={"TERM": "xterm"})
    )
    return stream


def lines(output: io.StringIO) -> list[str]:
    """Lines with their rates and times blanked."""
    text = re.sub(r"[\d.e+]+ clients/s", "# clients/s", output.getvalue())
    return re.sub(r"\d:\d\d:\d\d", "0:00:00", text).splitlines()


def fit(*callbacks: object, **settings: object) -> None:
    trainer = make_trainer(*callbacks, **settings)
    trainer.fit(FakeModule(), datamodule=FakeData(CHUNKS), ckpt_path=settings.get("resume"))


def test_a_line_each_round(output: io.StringIO) -> None:
    fit(
        RoundProgressBar(interval_s=0),
        GeneralizedAccuracy(),
        PersonalizedAccuracy(),
        max_epochs=2,
        num_sanity_val_steps=1,
    )
    end = "global loss 0.5000  val generalized 0.5000  personalized 0.6000"
    assert lines(output) == [
        f"Round 1/2  clients 4/4  # clients/s  time left 0:00:00  {end}",
        f"Round 2/2  clients 4/4  # clients/s  time left 0:00:00  {end}",
    ]


def test_few_lines_and_the_last_one(output: io.StringIO) -> None:
    fit(RoundProgressBar(), max_epochs=30, limit_val_batches=0)
    assert [line.split("  ")[0] for line in lines(output)] == ["Round 1/30", "Round 30/30"]


@pytest.mark.parametrize(
    ("limits", "label"),
    [({"max_epochs": -1, "max_time": "00:00:00:01"}, "Round 1"), ({"max_epochs": -1, "max_steps": 3}, "Round 1/3")],
)
def test_without_a_number_of_rounds(output: io.StringIO, limits: dict[str, object], label: str) -> None:
    """The server makes one step a round."""
    fit(RoundProgressBar(), limit_val_batches=0, **limits)
    first = lines(output)[0]
    assert first.startswith(f"{label}  clients 4/4")
    assert ("time left" in first) == ("/3" in label)


def test_a_resumed_fit_goes_on_at_its_round(output: io.StringIO, tmp_path: Path) -> None:
    data = FakeData(CHUNKS)
    first = make_trainer(max_epochs=2, limit_val_batches=0)
    first.fit(FakeModule(), datamodule=data)
    first.save_checkpoint(tmp_path / "last.ckpt")
    trainer = make_trainer(RoundProgressBar(interval_s=0), max_epochs=4, limit_val_batches=0)
    trainer.fit(FakeModule(), datamodule=data, ckpt_path=tmp_path / "last.ckpt", weights_only=False)
    assert [line.split("  ")[0] for line in lines(output)] == ["Round 3/4", "Round 4/4"]


def test_time_left_of_a_resumed_fit_counts_its_own_rounds(output: io.StringIO) -> None:
    """Rounds 11 and 12 of 20 took 15 s each: 8 more take 120 s; 40 clients took 30 s."""
    now = 100.0
    rich.get_console().get_time = lambda: now
    display = ProgressDisplay(rich.get_console(), interval_s=0)

    def shown(completed: float, total: float | None, clients: int) -> str:
        return display.show("fit", "Round", "", completed, total, clients)

    assert shown(10.0, 20, 0) == "Round  0 clients/s  time left -:--:--"
    now = 115.0
    assert shown(11.0, 20, 15) == "Round  1 clients/s  time left -:--:--"  # Rich needs two steps
    now = 130.0
    assert shown(12.0, 20, 40) == "Round  1.33 clients/s  time left 0:02:00"
    assert display.show("other", "Round", "", 10.0, None, 0) == "Round  0 clients/s"


def test_each_population_is_shown(output: io.StringIO) -> None:
    data = FakeData(CHUNKS, seen=CHUNKS, new=CHUNKS[:1])
    make_trainer(RoundProgressBar()).test(FakeModule(), datamodule=data, verbose=False)
    assert lines(output)[-2:] == [
        "Personalize & evaluate (seen clients)  clients 4  # clients/s  time left 0:00:00",
        "Personalize & evaluate (new clients)  clients 2  # clients/s  time left 0:00:00",
    ]


def test_validation_and_prediction_alone(output: io.StringIO) -> None:
    data = FakeData(CHUNKS)
    make_trainer(RoundProgressBar(interval_s=0)).validate(FakeModule(), datamodule=data, verbose=False)
    make_trainer(RoundProgressBar(interval_s=0)).predict(FakeModule(), datamodule=data, return_predictions=False)
    assert [line.split("  ")[:2] for line in lines(output)] == [
        ["Personalize & evaluate", "clients 2"],
        ["Personalize & evaluate", "clients 4"],
        ["Personalize & predict", "clients 2"],
        ["Personalize & predict", "clients 4"],
    ]


@pytest.mark.parametrize("output", ["terminal"], indirect=True)
def test_bars_on_a_terminal(output: io.StringIO) -> None:
    bar = RoundProgressBar()
    fit(bar, GeneralizedAccuracy(), PersonalizedAccuracy(), max_epochs=2)
    make_trainer(bar).test(FakeModule(), datamodule=FakeData([], seen=CHUNKS), verbose=False)
    text = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", output.getvalue())
    assert re.search(r"Round 2/2 ━+ clients 4/4 \S+ clients/s time left 0:00:00", text)
    assert "global loss 0.5000  val generalized 0.5000  personalized 0.6000" in text
    assert re.search(r"Personalize & evaluate \(seen clients\) ━+ clients 4", text)
    assert output.getvalue().count("\x1b[?25l") == output.getvalue().count("\x1b[?25h")  # the cursor is back


@pytest.mark.parametrize("output", ["terminal"], indirect=True)
def test_the_terminal_is_given_back_when_a_run_fails(output: io.StringIO) -> None:
    class Failing(FakeModule):
        def training_step(self, batch: object, batch_idx: int) -> None:
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        make_trainer(RoundProgressBar(), max_epochs=1).fit(Failing(), datamodule=FakeData(CHUNKS))
    assert output.getvalue().endswith("\x1b[?25h")


def test_a_disabled_bar_is_silent(output: io.StringIO) -> None:
    bar = RoundProgressBar()
    bar.disable()
    fit(bar, max_epochs=1)
    assert not bar.is_enabled
    assert not output.getvalue()


def test_a_negative_interval_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="interval_s is -1"):
        RoundProgressBar(interval_s=-1)


def test_clients_of_all_processes_are_counted() -> None:
    """Ten clients on two processes: this one, with the larger clients, has fewer of them."""
    sizes = np.array([90, *[10] * 9])
    sampler = CohortSampler(np.arange(10), sizes, cohort_size=None, chunk_size=3, seed=0, rank=0, world_size=2)
    chunks = list(sampler)
    assert sum(len(chunk.clients) for chunk in chunks) == 1
    loader = SimpleNamespace(sampler=sampler)
    assert sum(served_clients(loader, chunk.clients, i) for i, chunk in enumerate(chunks)) == 10
