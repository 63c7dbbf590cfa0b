"""Record the stage of a run in a file, which can be read even after the run was killed."""

from __future__ import annotations

import mmap
from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import Callback

STAGES = ("starting", "training", "between", "validation", "saving", "ending")


class Stages(Callback):
    """Keeps the stage of the run in the first byte of a file that is mapped into memory.

    Args:
        path: the file.
    """

    def __init__(self, path: str) -> None:
        Path(path).write_bytes(b"\0")
        with open(path, "r+b") as file:
            self._byte = mmap.mmap(file.fileno(), 1)

    def _at(self, stage: str) -> None:
        self._byte[0] = STAGES.index(stage)

    def on_train_batch_start(self, *_: Any) -> None:
        self._at("training")

    def on_train_batch_end(self, *_: Any) -> None:
        self._at("between")

    def on_validation_start(self, trainer: Any, *_: Any) -> None:
        self._at("starting" if trainer.sanity_checking else "validation")

    def on_validation_end(self, trainer: Any, *_: Any) -> None:
        # the checkpoint of the best round follows
        self._at("starting" if trainer.sanity_checking else "saving")

    def on_train_epoch_end(self, *_: Any) -> None:
        # the checkpoint of the last round follows
        self._at("saving")

    def on_train_epoch_start(self, *_: Any) -> None:
        self._at("between")

    def on_train_end(self, *_: Any) -> None:
        self._at("ending")


def stage(path: Path) -> str:
    """Return the stage of the run that writes a file, or its last stage if it was killed."""
    return STAGES[path.read_bytes()[0]] if path.exists() and path.stat().st_size else "starting"
