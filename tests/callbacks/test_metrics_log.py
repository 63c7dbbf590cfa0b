"""The log of a run that is broken off and resumed: every round once, as if nothing had been."""

import csv
import resource
from pathlib import Path

import pytest

from flow_pl.cli import run
from flow_pl.errors import FlowError
from flow_pl.loggers import MetricsFile
from flow_pl.utils.checkpoints import WholeCheckpointIO
from tests.test_cli import config  # noqa: F401 (a fixture)


def rows(path):
    with Path(path).open(newline="") as file:
        return list(csv.DictReader(file))


def logged(file, **metrics):
    step = metrics.pop("step")
    file.log_metrics({name.replace("_", "/", 1): value for name, value in metrics.items()}, step)
    file.save()


def test_a_column_that_comes_later_is_put_into_the_rows_before(tmp_path):
    file = MetricsFile(str(tmp_path))
    logged(file, step=1, train_loss=0.5)
    logged(file, step=1, val_gain=0.25)
    logged(file, step=2, train_loss=0.125)
    expected = [("1", "0.5", ""), ("1", "", "0.25"), ("2", "0.125", "")]
    assert [
        tuple(row[name] for name in ("step", "train/loss", "val/gain")) for row in rows(file.metrics_file_path)
    ] == expected
    again = MetricsFile(str(tmp_path))
    logged(again, step=3, train_loss=1.0)
    assert [row["step"] for row in rows(file.metrics_file_path)] == ["1", "1", "2", "3"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.csv"]


@pytest.mark.parametrize("behind", ["", "2,0.2\n", "2,0.2\n3,0.3\n4,0.4\n", "2,0.2\n3,0.3", "2,0."])
def test_the_file_is_that_of_the_checkpoint_whatever_was_written_after_it(tmp_path, behind):
    """Killed before or after a row that follows the checkpoint, or in the middle of it."""
    (tmp_path / "metrics.csv").write_text("step,train/loss\n1,0.1\n" + behind)
    file = MetricsFile(str(tmp_path))
    file.restore("step,train/loss\n1,0.1\n2,0.2\n")
    assert rows(tmp_path / "metrics.csv") == [{"step": "1", "train/loss": "0.1"}, {"step": "2", "train/loss": "0.2"}]
    logged(file, step=3, train_loss=0.25)
    assert [row["step"] for row in rows(tmp_path / "metrics.csv")] == ["1", "2", "3"]


@pytest.mark.parametrize("found", [None, [{"step": 1}]])
def test_a_checkpoint_without_the_rows_is_refused(tmp_path, found):
    with pytest.raises(FlowError, match=r"lacks the rows of the log.*start anew"):
        MetricsFile(str(tmp_path)).restore(found)


def test_a_checkpoint_has_the_metrics_of_its_round_once(tmp_path):
    """Lightning logs them after the checkpoint of the round, and before that of an exception."""
    file, last = MetricsFile(str(tmp_path)), {"train/loss": 0.5, "step": 1}
    logged(file, step=1, val_gain=0.25)
    expected = "val/gain,step,train/loss\n0.25,1,\n,1,0.5\n"
    assert file.text_with(last) == expected
    logged(file, step=1, train_loss=0.5)
    assert file.text_with(last) == file.text_with({}) == expected


def test_a_full_disk_leaves_the_rows_of_before_and_is_told(tmp_path):
    file = MetricsFile(str(tmp_path))
    logged(file, step=1, train_loss=0.5)
    before = Path(file.metrics_file_path).read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 3, limits[1]))
    try:
        for metrics in ({"train_loss": 0.25}, {"val_gain": 0.25}):
            with pytest.raises(FlowError, match=r"metrics\.csv cannot be written"):
                logged(file, step=2, **metrics)
            file.save()  # as Lightning does when a run fails
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert Path(file.metrics_file_path).read_bytes() == before


class _KilledError(BaseException):
    pass


def _killed_at(monkeypatch, place, number):
    """Break a run off before or behind the n-th row, or the n-th checkpoint."""
    seen = []

    def guard(original, before):
        def call(*args, **settings):
            seen.append(1)
            if len(seen) == number and before:
                raise _KilledError
            result = original(*args, **settings)
            if len(seen) == number:
                raise _KilledError
            return result

        return call

    cls, name = {
        "before a row": (MetricsFile, "save"),
        "behind a row": (MetricsFile, "save"),
        "behind a checkpoint": (WholeCheckpointIO, "save_checkpoint"),
    }[place]
    monkeypatch.setattr(cls, name, guard(getattr(cls, name), place.startswith("before")))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("place", "number"),
    [
        *[("behind a row", number) for number in (2, 5)],
        ("before a row", 2),
        ("behind a checkpoint", 3),
        *[pytest.param("before a row", 5, marks=pytest.mark.extended)],
        *[pytest.param("behind a row", 7, marks=pytest.mark.extended)],
        *[pytest.param("behind a checkpoint", number, marks=pytest.mark.extended) for number in (2, 4)],
    ],
)
def test_a_run_broken_off_anywhere_logs_every_round_once(config, tmp_path, monkeypatch, place, number):  # noqa: F811
    """Every save of a row (also one of nothing) and every checkpoint; round 3 is validated as well as round 1."""
    words = ["fit", "--config", str(config), "--trainer.max_epochs=3", "--trainer.enable_progress_bar=false"]
    words += ["--data.cache_dir", str(tmp_path.parent / "cache"), "--trainer.check_val_every_n_epoch=1"]
    whole = tmp_path.parent / "whole"
    if not whole.exists():
        run([*words, f"--trainer.default_root_dir={whole}"])
    with monkeypatch.context() as patch:
        _killed_at(patch, place, number)
        with pytest.raises(_KilledError):
            run(words)
    run([*words, "--ckpt_path", "last"])
    logs = tmp_path / "run" / "logs"
    # a run that was broken off before its first checkpoint has started anew, with a log of its own
    last = max(logs.glob("version_*"), key=lambda path: path.name)
    assert last.name == "version_0" or len(rows(logs / "version_0" / "metrics.csv")) <= 1
    assert rows(last / "metrics.csv") == rows(whole / "logs" / "version_0" / "metrics.csv")


def test_a_fit_from_an_earlier_checkpoint_or_another_run(config, tmp_path):  # noqa: F811
    """Goes on in its own run's log, from the round of the checkpoint; another run copies these rows to a new log."""
    words = ["fit", "--config", str(config), "--trainer.enable_progress_bar=false"]
    listed = ["--trainer.callbacks+=ModelCheckpoint", f"--trainer.callbacks.dirpath={tmp_path / 'run' / 'kept'}"]
    listed += ["--trainer.callbacks.save_top_k=-1", "--trainer.callbacks.filename={epoch}"]
    listed += ["--trainer.callbacks.save_on_train_epoch_end=true"]
    run([*words, "--trainer.max_epochs=4", *listed])
    path = tmp_path / "run" / "logs" / "version_0" / "metrics.csv"
    before = rows(path)
    second = str(tmp_path / "run" / "kept" / "epoch=1.ckpt")
    run([*words, "--trainer.max_epochs=3", "--ckpt_path", second, *listed])
    assert rows(path) == [row for row in before if row["step"] in "123"]
    run([*words, "--trainer.max_epochs=3", "--ckpt_path", second, f"--trainer.default_root_dir={tmp_path / 'other'}"])
    other = rows(tmp_path / "other" / "logs" / "version_0" / "metrics.csv")
    assert other == rows(path)


def test_a_run_put_aside_keeps_its_log(config, tmp_path):  # noqa: F811
    """Also if the new fit starts from its checkpoint, whose log has the number of another one by then."""
    words = ["fit", "--config", str(config), "--trainer.enable_progress_bar=false"]
    root = tmp_path / "run"
    run([*words, "--trainer.max_epochs=1"])
    before = rows(root / "logs" / "version_0" / "metrics.csv")
    run([*words, "--trainer.max_epochs=2"])
    moved = root / "earlier" / "1"
    assert [path.name for path in (root / "logs").iterdir()] == ["version_1"]
    (root / "logs" / "version_1").rename(root / "logs" / "version_0")
    run([*words, "--trainer.max_epochs=2", "--ckpt_path", str(moved / "checkpoints" / "last.ckpt")])
    assert rows(moved / "logs" / "version_0" / "metrics.csv") == before
    assert len(rows(root / "earlier" / "2" / "logs" / "version_0" / "metrics.csv")) > len(before)
    assert [path.name for path in (root / "logs").iterdir()] == ["version_1"]


def test_a_test_has_a_log_of_its_own_without_the_rounds_of_the_fit(config, tmp_path):  # noqa: F811
    words = ["--config", str(config), "--trainer.enable_progress_bar=false"]
    run(["fit", *words, "--trainer.max_epochs=1"])
    run(["test", *words])
    fitted, tested = (rows(tmp_path / "run" / "logs" / f"version_{i}" / "metrics.csv") for i in (0, 1))
    assert any(name.startswith("train/") for row in fitted for name in row)
    assert len(tested) == 1
    assert "test/seen/personalized_accuracy" in tested[0]
    assert not any(name.startswith(("train/", "val/")) for name in tested[0])
