"""Keeps one Weights & Biases run for each run of this project, through interruptions, tests and sweeps.

Nothing here imports wandb; Lightning's logger does, when it is used.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from flow_pl.loggers import NOTE, Note, read_note, wandb_loggers
from flow_pl.utils.files import write_text

SLACK = 10
"""Rows that a killed process may have logged since it last wrote the note; a round logs two."""


class WandbRun(Callback):
    """Records the W&B run of a fit in the run's folder, where `continued_run` finds it.

    A command that continues the run offline, where the server cannot report how many rows it has, counts its rows from
    there on, so that `wandb sync` can append them. A new fit that is not logged to W&B removes the record
    of the run it replaces.
    """

    def __init__(self) -> None:
        self._path: Path | None = None
        self._run: Any = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write the record, in the first process."""
        self._path = None
        loggers = wandb_loggers(trainer)
        if not loggers or not trainer.is_global_zero:
            return
        path, run = Path(trainer.default_root_dir) / NOTE, loggers[0].experiment
        note = read_note(path)
        continued = note is not None and note.id == run.id
        if note is not None and continued and run.step == 0:
            run.log({}, step=note.step + SLACK)
        if continued or stage == "fit":
            path.parent.mkdir(parents=True, exist_ok=True)
            self._path, self._run = path, run
            self._write()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remove the record of a run that is replaced by one not logged to W&B."""
        # a trial (fast_dev_run) has dummy loggers, and replaces nothing
        trial = getattr(trainer, "fast_dev_run", False)
        if trainer.is_global_zero and trainer.current_epoch == 0 and not trial and not wandb_loggers(trainer):
            (Path(trainer.default_root_dir) / NOTE).unlink(missing_ok=True)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record the number of rows of the last round."""
        self._write()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Record the final number of rows."""
        self._write()
        self._path = None

    def _write(self) -> None:
        if self._path is not None:
            write_text(self._path, json.dumps(Note(self._run.id, self._run.step)._asdict()) + "\n")
