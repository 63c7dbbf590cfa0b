"""Handle signals that end a run early between two steps rather than within one."""

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
    """Lets Lightning act on SIGTERM and on SLURM's requeue signal when all processes are at the same point.

    Lightning acts within the signal handler, which could save a model in the middle of the server's step, and its
    messages to other processes could interleave with those of a round and hang. Here a signal to any process is only
    recorded.

    On SIGTERM the run stops after the current chunk of clients, or after the validation; its last checkpoint is
    that of the last completed round. On the requeue signal (SIGUSR1, if not set otherwise) it continues to
    the end of the round, saves `hpc_ckpt_<n>.ckpt` in `trainer.default_root_dir` and calls `scontrol requeue`; the same
    command, restarted by SLURM, resumes from there. So let SLURM send it early enough for a round and a validation
    (`#SBATCH --signal=USR1@<seconds>`).
    """

    def __init__(self) -> None:
        self._handlers: dict[int, Callable[[int, FrameType | None], Any]] = {}
        self._noted: set[int] = set()

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Replace Lightning's handlers."""
        self._take_over(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Replace Lightning's handlers."""
        self._take_over(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop within a round; a complete round is validated and saved first."""
        if not trainer.is_last_batch:
            self._act(trainer, signal.SIGTERM)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save and requeue, or stop, after a complete round."""
        for number in sorted(self._handlers):
            self._act(trainer, number)

    def _take_over(self, trainer: Trainer) -> None:
        if trainer.state.fn != "fit" or threading.current_thread() is not threading.main_thread():
            return
        environment = trainer._accelerator_connector.cluster_environment  # the condition that Lightning checks
        slurm = environment if isinstance(environment, SLURMEnvironment) and environment.auto_requeue else None
        for number in {signal.SIGTERM, *([slurm.requeue_signal] if slurm and slurm.requeue_signal else [])}:
            handler = signal.getsignal(number)
            if callable(handler) and handler != self._note:
                self._handlers[int(number)] = handler
                signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._noted.add(number)

    def _act(self, trainer: Trainer, number: int) -> None:
        """Do what Lightning does, in all processes, if any of them received the signal."""
        if number in self._handlers and trainer.strategy.reduce_boolean_decision(number in self._noted, all=False):
            self._noted.discard(number)
            self._handlers[number](number, None)
