"""The metrics of every round in one CSV file, each row once, however often a run is killed and resumed."""

from __future__ import annotations

import csv
import io
import os
from pathlib import Path
from typing import Any

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter

from flow_pl.checkpoints import look_at, resumed_checkpoint
from flow_pl.files import unwritable, write_text


class RunLogger(CSVLogger):
    """Lightning's CSVLogger, whose file is never half written and can be gone on with.

    Attributes:
        continued: whether it goes on with the file of a run that was interrupted.
    """

    continued = False

    def go_on(self, version: int | str) -> None:
        """Write to the folder of an earlier version from now on, where it is still there."""
        if (Path(self.root_dir) / f"version_{version}").is_dir():
            self._version, self.continued = version, True

    @property
    @rank_zero_experiment
    def experiment(self) -> MetricsFile:
        """What writes the file."""
        if self._experiment is None:
            self._experiment = MetricsFile(self.log_dir)
        assert isinstance(self._experiment, MetricsFile)
        return self._experiment


class MetricsFile(ExperimentWriter):
    """Rows of metrics, below one header; a column that comes later is put into it.

    Args:
        log_dir: folder of the file; what is there of it is kept.
    """

    def __init__(self, log_dir: str) -> None:
        try:
            super().__init__(log_dir)
        except OSError as error:
            raise unwritable(Path(log_dir), error) from error
        self._path = Path(self.metrics_file_path)
        self.metrics_keys, rows = self._read()
        self.rows = len(rows)

    def _check_log_dir_exists(self) -> None:
        """Lightning deletes the file here."""

    def save(self) -> None:
        """Append the rows that have come since the last time.

        Raises:
            FlowError: the disk is full; the rows of before are intact.
        """
        if not self.metrics:
            return
        new_keys = self._record_new_keys()
        rows, self.metrics = self.metrics, []
        self.rows += len(rows)
        if new_keys:
            self._write([*self._read()[1], *rows])
            return
        text = self._csv(rows, header=False)
        try:
            # without a buffer: a kill leaves all of it or nothing
            with self._path.open("ab", buffering=0) as file:
                end = file.tell()
                if file.write(text.encode()) < len(text.encode()):
                    file.truncate(end)
                    raise OSError("there is no space left")
        except OSError as error:
            raise unwritable(self._path, error) from error

    def keep(self, rows: int, step: int, last: dict[str, float]) -> None:
        """Forget what was logged behind a checkpoint.

        Args:
            rows: that were there when it was written.
            step: round of the checkpoint; rows of it that came later are kept.
            last: the training metrics of that round, which are logged only behind the checkpoint; they are added if the
                run was killed in between.
        """
        _, there = self._read()
        kept = there[:rows] + [row for row in there[rows:] if row["step"] == str(step)]
        if last and not any(row["step"] == str(step) and all(row.get(name) for name in last) for row in kept):
            kept.append({**last, "step": step})
        self.metrics_keys = sorted({*self.metrics_keys, *(name for row in kept for name in row)})
        self.metrics, self.rows = [], len(kept)
        self._write(kept)

    def _read(self) -> tuple[list[str], list[dict[str, Any]]]:
        """Header and whole rows of the file."""
        if not self._path.exists():
            return [], []
        text = self._path.read_text(encoding="utf-8")
        reader = csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1], newline=""))
        return list(reader.fieldnames or []), list(reader)

    def _write(self, rows: list[dict[str, Any]]) -> None:
        write_text(self._path, self._csv(rows, header=True))

    def _csv(self, rows: list[dict[str, Any]], header: bool) -> str:
        text = io.StringIO()
        writer = csv.DictWriter(text, self.metrics_keys, lineterminator="\n")
        if header:
            writer.writeheader()
        writer.writerows(rows)
        return text.getvalue()


class MetricsLog(Callback):
    """Notes in every checkpoint how far the `RunLogger`s' files have come, and takes them back to there on resuming."""

    def __init__(self) -> None:
        self._trainer: Trainer | None = None
        self._ended = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Know the loggers."""
        self._trainer = trainer

    def state_dict(self) -> dict[str, Any]:
        """Version and rows of the file, and what is not in it yet."""
        logger = None if self._trainer is None else _logger(self._trainer)
        if logger is None or self._trainer is None:
            return {}
        logged = self._trainer.logged_metrics if self._ended else {}  # in every process: it may be collective
        last = {name: float(value) for name, value in logged.items() if name.startswith(("train/", "privacy/"))}
        if not self._trainer.is_global_zero:
            return {}
        rows = logger.experiment.rows
        return {"version": logger.version, "rows": rows, "step": self._trainer.global_step, "last": last}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the file back to the checkpoint, where the fit goes on with it."""
        trainer = self._trainer
        logger = None if trainer is None else _logger(trainer)
        if trainer is not None and logger is not None and logger.continued and trainer.is_global_zero:
            logger.experiment.keep(state_dict["rows"], state_dict["step"], state_dict["last"])

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The round has no metrics yet."""
        self._ended = False

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The round's metrics are there; Lightning logs them behind the checkpoint."""
        self._ended = True


def continue_log(trainer: Trainer, ckpt_path: str | os.PathLike[str] | None) -> None:
    """Let a fit that goes on from a checkpoint of its own run write to that run's log.

    Args:
        trainer: of the fit.
        ckpt_path: as given on the command line.

    Raises:
        ConfigurationError: the checkpoint cannot be used.
    """
    path = resumed_checkpoint(trainer, ckpt_path)
    if path is None:
        return
    state = look_at(path).get("callbacks", {}).get(MetricsLog.__qualname__)
    logger = _logger(trainer)
    if state and logger is not None and path.resolve().is_relative_to(Path(trainer.default_root_dir).resolve()):
        logger.go_on(state["version"])


def _logger(trainer: Trainer) -> RunLogger | None:
    return next((logger for logger in trainer.loggers if isinstance(logger, RunLogger)), None)
