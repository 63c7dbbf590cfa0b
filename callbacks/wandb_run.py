"""Keeps one Weights & Biases run for each run of this project, through interruptions, tests and sweeps.

Nothing here imports wandb; Lightning's logger does, when it is used.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from flow_pl.errors import ConfigurationError
from flow_pl.loggers import wandb_loggers
from flow_pl.results.run_folder import find_checkpoint, goes_on
from flow_pl.utils.checkpoints import look_at

SLACK = 1000
"""Rows that may have been logged since the last checkpoint; a round logs two."""


class WandbRun(Callback):
    """Saves the id of a fit's W&B run in its checkpoints, where `continued_run` finds it.

    A command that continues the run offline, where the server cannot report how many rows it has, counts its rows from
    there on, so that `wandb sync` can append them. A fit that resumes without W&B passes the id on.
    """

    def __init__(self) -> None:
        self._run: Any = None
        self._saved: dict[str, Any] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the run, in the first process, and count its rows from those of the checkpoints on."""
        self._run, self._saved = None, {}
        loggers = wandb_loggers(trainer)
        if not loggers or not trainer.is_global_zero:
            return
        self._run = loggers[0].experiment
        rows = _saved_rows(Path(trainer.default_root_dir), self._run.id) if self._run.step == 0 else None
        if rows is not None:
            self._run.log({}, step=rows + SLACK)

    def state_dict(self) -> dict[str, Any]:
        """Return the id of the run and W&B's own counter of logged rows; that of the checkpoint without W&B."""
        return self._saved if self._run is None else {"id": self._run.id, "step": self._run.step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep what the checkpoint says."""
        self._saved = state_dict


def continued_run(root: Path, ckpt_path: str | os.PathLike[str] | None) -> str | None:
    """Return the W&B run that a command continues: the one whose checkpoint it starts from.

    Args:
        root: folder of the run.
        ckpt_path: the checkpoint given on the command line.

    Returns:
        The id; None if the checkpoint is not in the folder, its run was not logged to W&B, or the environment names a
        run (`WANDB_RUN_ID`), as in a sweep.
    """
    if "WANDB_RUN_ID" in os.environ:
        return None
    if ckpt_path in ("best", "last", "hpc"):
        with contextlib.suppress(ConfigurationError):  # a fit then starts from scratch
            return _saved(find_checkpoint(root, str(ckpt_path))).get("id")
        return None
    path = Path(str(ckpt_path))
    return _saved(path).get("id") if path.is_file() and goes_on(root, path) else None


def _saved(path: Path) -> dict[str, Any]:
    """Return what a checkpoint says of its W&B run; empty if nothing."""
    saved: dict[str, Any] = look_at(path).get("callbacks", {}).get(WandbRun.__qualname__, {})
    return saved


def _saved_rows(root: Path, run_id: str) -> int | None:
    """Return the largest number of rows in the checkpoints of a W&B run; None if there are none."""
    found = []
    for path in root.rglob("*.ckpt"):
        with contextlib.suppress(ConfigurationError):  # a damaged one, or not one of ours
            found.append(_saved(path))
    return max((saved["step"] for saved in found if saved.get("id") == run_id), default=None)
