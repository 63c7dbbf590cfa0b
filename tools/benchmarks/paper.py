"""Measure the cost of a training example in the published runs: `python -m tools.benchmarks.paper [task ...]`.

Trains two rounds of Flow with the settings of each task of the paper, on random rows of the data's shape, in separate
processes with one thread each. Prints the processor time of the cheaper round per training example and local epoch, and
the peak memory of the process. The cost does not depend on the values of the data.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from typing import Any

import lightning
import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from flow_pl.data import ClientData, FederatedDataModule
from flow_pl.serving import instantiate

PICTURE, CLASSES = "picture", "classes"
SHAPES: dict[str, dict[str, Any]] = {
    "emnist": {PICTURE: (1, 28, 28), CLASSES: 62, "clients": 5, "rows": 40},
    "cifar10": {PICTURE: (3, 32, 32), CLASSES: 10, "clients": 2, "rows": 20},
    "cifar100": {PICTURE: (3, 32, 32), CLASSES: 100, "clients": 2, "rows": 20},
    "stackoverflow": {"length": 20, CLASSES: 10_004, "clients": 10, "rows": 32},
    "shakespeare": {"length": 80, CLASSES: 90, "clients": 10, "rows": 8},
    "reddit": {"length": 10, CLASSES: 10_004, "clients": 10, "rows": 32},
    "stackoverflow_tags": {"words": 10_000, CLASSES: 500, "clients": 10, "rows": 64},
}
"""By task: shape of a row, and numbers of clients in a round and rows of a client."""

TUNED = {"cifar100": "cifar10", "reddit": "stackoverflow"}
"""Tasks with the tuned settings of another one."""


class RandomRows(FederatedDataModule):
    """Provides random rows in the shape of a data set's.

    Args:
        shape: an entry of `SHAPES`.
        **kwargs: settings of every data set, see `FederatedDataModule`.
    """

    def __init__(self, shape: dict[str, Any], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._shape = shape

    def options(self) -> dict[str, Any]:
        """Return the shape."""
        return self._shape

    def class_count(self) -> int:
        """Return the data set's number of classes."""
        classes: int = self._shape[CLASSES]
        return classes

    def clients(self) -> Iterator[ClientData]:
        """Yield as many clients as a round has."""
        random, n, classes = np.random.default_rng(0), self._shape["rows"], self._shape[CLASSES]
        for client in range(self._shape["clients"]):
            if PICTURE in self._shape:
                x = random.integers(256, size=(n, *self._shape[PICTURE]), dtype=np.uint8)
                y = random.integers(classes, size=n)
            elif "length" in self._shape:
                tokens = random.integers(4, classes, size=(n, self._shape["length"] + 1), dtype=np.int32)
                x, y = tokens[:, :-1], tokens[:, 1:].astype(np.int64)
            else:
                x = random.random((n, self._shape["words"]), dtype=np.float32)
                y = (random.random((n, classes)) < 0.01).astype(np.int64)
            yield ClientData(f"client-{client}", x, y)


class Clock(Callback):
    """Measures the processor time of each round."""

    def __init__(self) -> None:
        self.rounds: list[float] = []

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self.rounds.append(-time.process_time())

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock."""
        self.rounds[-1] += time.process_time()


def measure(task: str, rounds: int = 2) -> dict[str, Any]:
    """Train Flow with a task's published settings on random rows.

    Args:
        task: name of a shipped task with a published Flow.
        rounds: number of rounds, of which the cheapest counts.

    Returns:
        The task, milliseconds of a core per example and local epoch, and MB of memory.
    """
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    module, published = instantiate([f"task/{task}", f"tuned/{TUNED.get(task, task)}/flow"])
    shape, clock = SHAPES[task], Clock()
    with tempfile.TemporaryDirectory() as cache:
        data = RandomRows(
            shape, cohort_size=shape["clients"], chunk_size=published.chunk_size,
            new_client_fraction=0.0, val_fraction=0.0, test_fraction=0.0, cache_dir=cache, seed=0,
        )  # fmt: skip
        trainer = lightning.Trainer(
            max_epochs=rounds, accelerator="cpu", devices=1, callbacks=[clock], limit_val_batches=0, logger=False,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(module, datamodule=data)
    steps = shape["clients"] * shape["rows"] * module.loop.local_epochs
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"task": task, "ms": round(1000 * min(clock.rounds) / steps, 2), "memory_mb": round(memory)}


def main(tasks: list[str]) -> None:
    """Measure each task in its own process; a single one in this process."""
    if len(tasks) == 1:
        print(json.dumps(measure(tasks[0])))
        return
    for task in tasks or SHAPES:
        subprocess.run([sys.executable, "-m", "tools.benchmarks.paper", task], check=True)


if __name__ == "__main__":
    main(sys.argv[1:])
