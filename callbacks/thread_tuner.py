"""Measure in the first rounds how many threads torch should use on a CPU."""

from __future__ import annotations

import os
import time
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info

from flow_pl.callbacks._federated import federated_module

SET_BY_USER = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
"""Environment variables by which a user sets the number of threads."""

TURNS = 2
"""Rounds for each of two numbers that are compared, alternating; the faster one of each counts."""

GAIN = 0.95
"""A larger number of threads must take less than this share of the time of the smaller one."""

COLLAPSE = 1.5
"""A round that takes longer than one thread by this factor is a collapse; two in a row end the use of several."""


class ThreadTuner(Callback):
    """Chooses torch's number of threads by the time of training rounds; starts with one.

    Several threads help large models and hurt small ones, much so if another process is busy on the same cores. After
    a round of one thread to warm up, two numbers alternate for four rounds: one and two threads, then the better of
    them and twice as many, and so on up to torch's own number, until more threads do not pay. Should several threads
    later become slower than one was, because the machine is busy, one is used from then on.

    Costs are seconds per training example, so that cohorts of different sizes can be compared. With
    `data.chunk_size: auto`, the chunk is measured first. Nothing is done on a GPU, or if `OMP_NUM_THREADS` or
    `MKL_NUM_THREADS` is set. The number is stored in checkpoints, and the previous one is restored after the fit.

    Sums may be rounded differently with another number of threads. So runs that must be repeatable to the last bit
    should set a number instead.
    """

    def __init__(self) -> None:
        self._before: int | None = None
        self._active = False
        self._resumed: int | None = None
        self._single: float | None = None
        self._start = 0.0
        self._begin()

    def _begin(self) -> None:
        """Forget what was measured."""
        self._settled = False
        self._warm = False
        self._pair = (1, 2)
        self._costs: dict[int, list[float]] = {}
        self._slow = 0
        self._seconds, self._examples = 0.0, 0

    @property
    def threads(self) -> int:
        """Return the number of threads that torch uses now."""
        return torch.get_num_threads()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin with one thread, or the number of the checkpoint."""
        self._before = torch.get_num_threads()
        by_user = any(name in os.environ for name in SET_BY_USER)
        self._active = pl_module.device.type == "cpu" and self._before > 1 and not by_user
        if not self._active:
            return
        self._begin()
        if self._resumed is None:
            self._single = None
            torch.set_num_threads(1)
        else:
            self._settled = True
            torch.set_num_threads(min(self._resumed, self._before))

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Start the clock."""
        self._start = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Add the time of a chunk of clients, and its examples."""
        self._seconds += time.perf_counter() - self._start
        self._examples += sum(batch.train.sizes)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record the round's cost and set the number of threads for the next round."""
        cost = self._seconds / self._examples if self._examples else None
        self._seconds, self._examples = 0.0, 0
        if not self._active or cost is None or not federated_module(pl_module).chunks.settled:
            return
        if self._settled:
            self._watch(cost)
        elif not self._warm:
            self._warm = True
        else:
            self._compare(cost)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore the number of threads."""
        self._restore()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Restore the number of threads."""
        self._restore()

    def state_dict(self) -> dict[str, Any]:
        """Return the chosen number; None while it is measured."""
        return {"threads": self.threads if self._active and self._settled else self._resumed, "single": self._single}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the number of a checkpoint."""
        self._resumed, self._single = state_dict["threads"], state_dict["single"]

    def _compare(self, cost: float) -> None:
        """Take the next turn of the two numbers that are compared, or draw the conclusion."""
        fewer, more = self._pair
        self._costs.setdefault(self.threads, []).append(cost)
        if len(self._costs.get(more, ())) < TURNS:
            torch.set_num_threads(more if self.threads == fewer else fewer)
            return
        best = {count: min(costs) for count, costs in self._costs.items()}
        if self._single is None:
            self._single = best[1]
        assert self._before is not None
        pays = best[more] < GAIN * best[fewer]
        self._costs = {}
        if pays and more < self._before:
            self._pair = (more, min(2 * more, self._before))
            torch.set_num_threads(more)
            return
        self._settled = True
        torch.set_num_threads(more if pays else fewer)
        rank_zero_info(f"torch uses {self.threads} of {self._before} threads, as measured by ThreadTuner")

    def _watch(self, cost: float) -> None:
        """Return to one thread if several have become slower than one."""
        if self.threads == 1 or self._single is None:
            return
        self._slow = self._slow + 1 if cost > COLLAPSE * self._single else 0
        if self._slow == 2:
            rank_zero_info(f"rounds with {self.threads} threads have become slow, as on a busy machine: one is used")
            torch.set_num_threads(1)

    def _restore(self) -> None:
        if self._active and self._before is not None:
            torch.set_num_threads(self._before)
            self._active = False
