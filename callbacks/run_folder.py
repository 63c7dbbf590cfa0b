"""Manage the folder of a run: its checkpoints, the files of an earlier run, and a final summary."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from rich import get_console

from flow_pl.results.run_folder import CHECKPOINTS, CONFIG, best_checkpoint, goes_on, put_aside
from flow_pl.utils.checkpoints import look_at


class BestCheckpoint(ModelCheckpoint):
    """Writes `checkpoints/best.ckpt`: the round with the best personalized accuracy in validation.

    A separate class, so that its state never mixes with that of a ModelCheckpoint with the same monitor.

    Args:
        root: folder of the run.
    """

    def __init__(self, root: str | Path) -> None:
        super().__init__(
            Path(root) / CHECKPOINTS,
            filename="best",
            monitor="val/personalized_accuracy",
            mode="max",
            enable_version_counter=False,
        )


class LastCheckpoint(ModelCheckpoint):
    """Writes `checkpoints/last.ckpt` after every round.

    Args:
        root: folder of the run.
    """

    def __init__(self, root: str | Path) -> None:
        super().__init__(
            Path(root) / CHECKPOINTS, filename="last", save_on_train_epoch_end=True, enable_version_counter=False
        )


class RunFolder(Callback):
    """Keeps the files of a single run in its folder, and reports their locations at the end.

    A new fit moves the files of an earlier run in its folder (`trainer.default_root_dir`), its logs included, to
    `earlier/1`, `earlier/2` and so on. Nothing is lost, and `best.ckpt` and `last.ckpt` always belong to one run. A fit
    that resumes from a checkpoint in the folder leaves everything in place. A trial (`fast_dev_run`) changes
    nothing.
    """

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Move an earlier run aside, once data, model and checkpoint are known to fit together."""
        root = Path(trainer.default_root_dir)
        if _trial(trainer) or goes_on(root, trainer.ckpt_path):
            return
        # evaluated in all processes, since it may be collective
        folders = [Path(folder) for folder in (logger.log_dir for logger in trainer.loggers) if folder is not None]
        if trainer.is_global_zero:
            aside = put_aside(root, folders)
            if aside is not None:
                _say(f"an earlier run in {root} was moved to {aside}")
        trainer.strategy.barrier("an earlier run put aside")

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Report where the run is, which round was best, and how to test it."""
        if _trial(trainer) or not trainer.is_global_zero or not trainer.checkpoint_callbacks:
            return
        root, rounds = Path(trainer.default_root_dir), trainer.global_step
        best, config = best_checkpoint(root), root / CONFIG
        _say(f"run: {root}, {rounds} round{'' if rounds == 1 else 's'}")
        if best.is_file():
            _say(f"best: round {look_at(best)['global_step']}, {best}")
        if config.is_file():
            _say(f"test it: {_program()} test --config {shlex.quote(str(config))}")


def _program() -> str:
    """Return how this program was started: only `python -m` finds a user's modules in the current folder."""
    return "python -m flow_pl" if Path(sys.argv[0]).name == "__main__.py" else "flow-pl"


def _trial(trainer: Trainer) -> bool:
    return bool(getattr(trainer, "fast_dev_run", False))


def _say(text: str) -> None:
    get_console().print(text, soft_wrap=True, highlight=False, markup=False)
