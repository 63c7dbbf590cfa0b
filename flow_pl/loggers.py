"""Loggers of a run: a CSV file that survives kills and resumes; one W&B run through interruptions and sweeps.

Nothing here imports wandb; Lightning's logger does, when it is used.
"""

from __future__ import annotations

import csv
import io
import os
from pathlib import Path
from typing import Any

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger, WandbLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter

from flow_pl.utils.files import unwritable, write_text


class RunLogger(CSVLogger):
    """Extends Lightning's CSVLogger: its file is never half written and can be continued.

    Attributes:
        continued: whether it continues the file of an interrupted run.
    """

    continued = False

    def continue_version(self, version: int | str) -> None:
        """Write to the folder of an earlier version from now on, if it still exists."""
        if (Path(self.root_dir) / f"version_{version}").is_dir():
            self._version, self.continued = version, True

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
        self._path = Path(self.metrics_file_path)
        self.metrics_keys, _ = self._read()

    def _check_log_dir_exists(self) -> None:
        """Do nothing, where Lightning deletes an existing file."""

    def save(self) -> None:
        """Append the rows logged since the last call.

        Raises:
            FlowError: the disk is full; earlier rows are intact.
        """
        if not self.metrics:
            return
        new_keys = self._record_new_keys()
        rows, self.metrics = self.metrics, []
        if new_keys:
            self._write([*self._read()[1], *rows])
            return
        text = self._csv(rows, header=False)
        try:
            # unbuffered: a kill leaves all of it or nothing
            with self._path.open("ab", buffering=0) as file:
                end = file.tell()
                if file.write(text.encode()) < len(text.encode()):
                    file.truncate(end)
                    raise OSError("there is no space left")
        except OSError as error:
            raise unwritable(self._path, error) from error

    def keep(self, step: int, last: dict[str, float]) -> None:
        """Discard what was logged after a checkpoint.

        Args:
            step: round of the checkpoint.
            last: the training metrics of that round, which are logged only after the checkpoint; they are added if the
                run was killed in between.
        """
        kept = [row for row in self._read()[1] if int(row["step"]) <= step]
        if last and not any(row["step"] == str(step) and all(row.get(name) for name in last) for row in kept):
            kept.append({**last, "step": step})
        self.metrics_keys = sorted({*self.metrics_keys, *(name for row in kept for name in row)})
        self.metrics = []
        self._write(kept)

    def _read(self) -> tuple[list[str], list[dict[str, Any]]]:
        """Read the header and the complete rows of the file."""
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
