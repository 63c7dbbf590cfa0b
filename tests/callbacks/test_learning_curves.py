"""The metrics of every validation in a file, also of a fit that was interrupted."""

import csv
import os
import sys
import time
from pathlib import Path

import pytest

from flow_pl.callbacks import GeneralizedAccuracy, LearningCurves, PersonalizedAccuracy
from flow_pl.errors import ConfigurationError
from tests.callbacks.fakes import FakeData, FakeModule, evaluation_chunk, make_trainer

CHUNKS = [evaluation_chunk([(4, 2, 3, 1, 4), (4, 1, 0, 0, 0)])]


def rows(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.open()))


def test_a_row_for_each_validated_round_and_for_the_last_one(tmp_path: Path) -> None:
    """Rounds 2 and 4 of five are validated: (2 + 1) of (4 + 4) examples are right."""
    path = tmp_path / "new folder" / "curve.csv"
    trainer = make_trainer(
        GeneralizedAccuracy(), LearningCurves(str(path), figure=None), max_epochs=5, check_val_every_n_epoch=2
    )
    trainer.fit(FakeModule(), datamodule=FakeData(CHUNKS))
    assert [(row["round"], row["generalized_accuracy"]) for row in rows(path)] == [
        ("2", "0.375"),
        ("4", "0.375"),
        ("5", ""),
    ]
    seconds = [float(row["train_seconds"]) for row in rows(path)]
    assert seconds == sorted(seconds)
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_the_figure_is_drawn_anew_at_every_validation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the run's folder, whole at any moment, and without a trace of what it was before."""
    drawn: list[tuple[int, bytes]] = []
    replace = os.replace

    def noted(source: Path, target: Path) -> None:
        replace(source, target)
        if Path(target).suffix == ".png":
            assert Path(source) != Path(target)
            drawn.append((len(rows(tmp_path / "curve.csv")), Path(target).read_bytes()))

    monkeypatch.setattr(os, "replace", noted)
    trainer = make_trainer(
        GeneralizedAccuracy(), PersonalizedAccuracy(), LearningCurves(), max_epochs=3, default_root_dir=tmp_path
    )
    trainer.fit(FakeModule(), datamodule=FakeData(CHUNKS))
    assert [number for number, _ in drawn] == [1, 2, 3]
    assert all(content.startswith(b"\x89PNG") for _, content in drawn)
    assert len({content for _, content in drawn}) == 3
    assert [path.name for path in (tmp_path / "figures").iterdir()] == ["curves.png"]


def test_without_accuracies_there_is_no_figure(tmp_path: Path) -> None:
    make_trainer(LearningCurves(), max_epochs=1, default_root_dir=tmp_path).fit(
        FakeModule(), datamodule=FakeData(CHUNKS)
    )
    assert [row["round"] for row in rows(tmp_path / "curve.csv")] == ["1"]
    assert not list((tmp_path / "figures").iterdir())


def test_the_table_needs_no_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    trainer = make_trainer(LearningCurves(), max_epochs=1, default_root_dir=tmp_path)
    with pytest.raises(ConfigurationError, match=r"or set figure to null\) needs matplotlib"):
        trainer.fit(FakeModule(), datamodule=FakeData(CHUNKS))
    make_trainer(LearningCurves(figure=None), max_epochs=1, default_root_dir=tmp_path).fit(
        FakeModule(), datamodule=FakeData(CHUNKS)
    )
    assert (tmp_path / "curve.csv").exists()


class SlowTraining(FakeModule):
    """A round takes 50 ms, a validation 200."""

    def training_step(self, batch: object, batch_idx: int) -> None:
        time.sleep(0.05)
        super().training_step(batch, batch_idx)  # type: ignore[arg-type]

    def on_validation_start(self) -> None:
        time.sleep(0.2)


def test_time_is_that_of_training(tmp_path: Path) -> None:
    trainer = make_trainer(LearningCurves(str(tmp_path / "curve.csv"), figure=None), max_epochs=2)
    trainer.fit(SlowTraining(), datamodule=FakeData(CHUNKS))
    assert 0.1 <= float(rows(tmp_path / "curve.csv")[-1]["train_seconds"]) < 0.2


def test_a_resumed_fit_goes_on_with_its_rows(tmp_path: Path) -> None:
    path = tmp_path / "curve.csv"

    def fit(rounds: int, **checkpoint: Path) -> None:
        trainer = make_trainer(
            GeneralizedAccuracy(),
            LearningCurves(str(path), figure=None),
            max_epochs=rounds,
            enable_checkpointing=True,
            default_root_dir=tmp_path,
        )
        trainer.fit(FakeModule(), datamodule=FakeData(CHUNKS), weights_only=False, **checkpoint)

    fit(2)
    before = rows(path)
    path.write_text("what a killed process may have left")
    fit(3, ckpt_path=next(tmp_path.rglob("*.ckpt")))
    after = rows(path)
    assert after[:2] == before
    assert [row["round"] for row in after] == ["1", "2", "3"]
    assert float(after[2]["train_seconds"]) >= float(before[-1]["train_seconds"])


def test_validation_alone_and_the_sanity_check_write_nothing(tmp_path: Path) -> None:
    trainer = make_trainer(
        LearningCurves(str(tmp_path / "curve.csv"), figure=None), max_epochs=1, num_sanity_val_steps=1
    )
    trainer.validate(FakeModule(), datamodule=FakeData(CHUNKS), verbose=False)
    assert not list(tmp_path.iterdir())
    trainer.fit(FakeModule(), datamodule=FakeData(CHUNKS))
    assert [row["round"] for row in rows(tmp_path / "curve.csv")] == ["1"]


def test_unusable_paths_are_refused_before_the_fit(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"expected a name that ends in \.csv"):
        LearningCurves("curve.json")
    (tmp_path / "file").touch()
    trainer = make_trainer(LearningCurves(str(tmp_path / "file" / "curve.csv"), figure=None), max_epochs=1)
    with pytest.raises(ConfigurationError, match="cannot be written"):
        trainer.fit(FakeModule(), datamodule=FakeData(CHUNKS))
