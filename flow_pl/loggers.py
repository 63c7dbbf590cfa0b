"""Loggers of a run: a CSV file that survives kills and resumes; one W&B run through interruptions and sweeps.

Nothing here imports wandb; Lightning's logger does, when it is used.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger, WandbLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter

from flow_pl.utils.files import unwritable
from flow_pl.utils.rows_file import RowsFile


class RunLogger(CSVLogger):
    """Extends Lightning's CSVLogger: its file is never half written and can be continued."""

    def continue_version(self, version: int | str) -> None:
        """Write to the folder of an earlier version from now on, if it still exists."""
        if (Path(self.root_dir) / f"version_{version}").is_dir():
            self._version = version

    @property
    @rank_zero_experiment
    def experiment(self) -> MetricsFile:
        """Return the writer of the file."""
        if self._experiment is None:
            self._experiment = MetricsFile(self.log_dir)
        assert isinstance(self._experiment, MetricsFile)
        return self._experiment


class MetricsFile(ExperimentWriter):
    """Writes rows of metrics below one header; columns that appear later are added to it.

    Args:
        log_dir: folder of the file; existing rows are kept.
    """

    def __init__(self, log_dir: str) -> None:
        try:
            super().__init__(log_dir)
        except OSError as error:
            raise unwritable(Path(log_dir), error) from error
        self._path, self._rows = Path(self.metrics_file_path), RowsFile()
        self._latest: list[dict[str, float]] = []  # of one step
        if self._path.exists():
            self._rows.restore(self._path.read_text(encoding="utf-8"))

    def _check_log_dir_exists(self) -> None:
        """Do nothing, where Lightning deletes an existing file."""

    def save(self) -> None:
        """Append the rows logged since the last call.

        Raises:
            FlowError: the disk is full; earlier rows are intact.
        """
        if self.metrics:
            rows, self.metrics = self.metrics, []
            self._latest = [row for row in (*self._latest, *rows) if row["step"] == rows[-1]["step"]]
            self._rows.add(*rows)
            self._rows.write(self._path)

    def text_with(self, last: dict[str, float]) -> str:
        """Return the rows as CSV.

        Args:
            last: metrics of a round, with its step, that may not be logged yet; they are added if no row has them.
        """
        rows = RowsFile()
        rows.restore(self._rows.text)
        rows.add(*self.metrics)
        logged = any(row["step"] == last.get("step") and last.keys() <= row.keys() for row in self._latest)
        if last and not logged:
            rows.add(last)
        return rows.text

    def restore(self, text: str | None) -> None:
        """Replace the rows by those of a checkpoint.

        Args:
            text: the rows as CSV.
        """
        self.metrics, self._latest = [], []
        self._rows.restore(text)
        self._rows.write(self._path)


def wandb_loggers(trainer: Trainer) -> list[WandbLogger]:
    """Return a trainer's W&B loggers, whose `log_table` and `log_image` take tables and images."""
    return [logger for logger in trainer.loggers if isinstance(logger, WandbLogger)]


def sweep_folder(root: str) -> str:
    """Return a run's folder: `<root>/sweeps/<sweep>/<run>` for each run that a sweep agent starts."""
    sweep, run = os.environ.get("WANDB_SWEEP_ID"), os.environ.get("WANDB_RUN_ID")
    return os.path.join(root, "sweeps", sweep, run) if sweep and run else root


def make_wandb_logger(run_id: str | None, make: type[WandbLogger], *args: Any, **settings: Any) -> WandbLogger:
    """Create a logger that continues a run, unless its own settings name one.

    Args:
        run_id: the run; None for a new one.
        make: the logger's class.
        *args: its arguments.
        **settings: its keyword arguments.

    Returns:
        The logger.
    """
    settings.pop("applied_instantiation_links", None)  # jsonargparse passes it to every instantiator
    if settings.get("id") is None and settings.get("version") is None:
        settings["id"] = run_id
    # A configuration passes `resume` as None, which would overwrite a run of that id: restore Lightning's default.
    if settings.get("resume") is None:
        settings["resume"] = "allow"
    return make(*args, **settings)
