"""Signals that end a run early, taken between two steps rather than in the middle of one."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback


class Preemption(Callback):
    """Lets Lightning act on SIGTERM, and on SLURM's signal to requeue, when all processes are at the same place.

    Lightning acts within the handler: it would save a model in the middle of the server's step, and its messages to the
    other processes would meet those of a round, which hangs. Here a signal, sent to any of the processes, is noted.

    On SIGTERM the run stops behind the chunk of clients that it is at, or behind the validation; its last checkpoint is
    that of the last round that was completed. On the signal to requeue (SIGUSR1, if not set otherwise) it goes on to
    the end of the round, saves `hpc_ckpt_<n>.ckpt` in `trainer.default_root_dir` and calls `scontrol requeue`; the same
    command, started again by SLURM, goes on from there. So let SLURM send it a round and a validation ahead
    (`#SBATCH --signal=USR1@<seconds>`).
    """

    def __init__(self) -> None:
        self._handlers: dict[int, Callable[[int, FrameType | None], Any]] = {}
        self._noted: set[int] = set()

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take over from Lightning's handlers."""
        self._take_over(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take over from Lightning's handlers."""
        self._take_over(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop in the middle of a round; one that is complete is validated and saved first."""
        if not trainer.is_last_batch:
            self._act(trainer, signal.SIGTERM)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save and requeue, or stop, with a round that is complete."""
        for number in sorted(self._handlers):
            self._act(trainer, number)

    def _take_over(self, trainer: Trainer) -> None:
        if trainer.state.fn != "fit" or threading.current_thread() is not threading.main_thread():
            return
        environment = trainer._accelerator_connector.cluster_environment  # what Lightning asks
        slurm = environment if isinstance(environment, SLURMEnvironment) and environment.auto_requeue else None
        for number in {signal.SIGTERM, *([slurm.requeue_signal] if slurm and slurm.requeue_signal else [])}:
            handler = signal.getsignal(number)
            if callable(handler) and handler != self._note:
                self._handlers[int(number)] = handler
                signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._noted.add(number)

    def _act(self, trainer: Trainer, number: int) -> None:
        """Do what Lightning does, in all processes, if any of them was sent the signal."""
        if number in self._handlers and trainer.strategy.reduce_boolean_decision(number in self._noted, all=False):
            self._noted.discard(number)
            self._handlers[number](number, None)
