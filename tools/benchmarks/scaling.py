"""Run the Trainer once at some scale, in a separate process: `python -m tools.benchmarks.scaling FOLDER JSON`."""

from __future__ import annotations

import json
import logging
import sys
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from flow_pl import FederatedLoop, FederatedModule
from flow_pl.data import ClientData, FederatedDataModule
from flow_pl.models import MLP, NextWordLSTM
from flow_pl.tasks import Classification, NextToken
from tools.benchmarks.ours import METHODS, TRACE_AFTER, trainer
from tools.benchmarks.peers.gate import processes
from tools.benchmarks.peers.run_torch import Turns

FEATURES, CLASSES, TOKENS, STEPS = 60, 10, 10_004, 20
AT_ONCE = 10_000
"""Number of clients drawn at once."""


@dataclass(frozen=True)
class Case:
    """Describes a point of a table.

    Attributes:
        population: number of clients in the store.
        cohort: number of clients in a round.
        examples: number of examples of a client, on average.
        spread: standard deviation of the logarithm of a client's number of examples; 0 if all have the same.
        chunk: number of clients side by side.
        hidden: width of the MLP; 0 for the language model.
        processes: number of processes that share the cohort, with a thread each.
        method: one of `METHODS`.
        batch_size: number of examples in a minibatch.
    """

    population: int = 1000
    cohort: int = 100
    examples: int = 50
    spread: float = 0.0
    chunk: int = 50
    hidden: int = 64
    processes: int = 1
    method: str = "FedAvg"
    batch_size: int = 10

    def json(self) -> str:
        """Return the case as JSON, for the command line."""
        return json.dumps(asdict(self))

    def others(self, what: str) -> str:
        """Describe all attributes except one."""
        return ", ".join(f"{name} {value}" for name, value in asdict(self).items() if name != what)

    def module(self) -> FederatedModule:
        """Create the module with model, method and loop."""
        torch.manual_seed(0)
        backbone = MLP(FEATURES, CLASSES, (self.hidden,)) if self.hidden else NextWordLSTM(TOKENS)
        method = METHODS[self.method](not self.hidden)
        loop = FederatedLoop(1, None, self.batch_size, partial(torch.optim.SGD, lr=0.01), trace_after=TRACE_AFTER)
        return FederatedModule(backbone, method, loop, Classification() if self.hidden else NextToken())


class ScaledData(FederatedDataModule):
    """Provides a population of random clients from a store.

    Args:
        case: the case.
        folder: folder of the stores.
    """

    def __init__(self, case: Case, folder: str) -> None:
        super().__init__(
            cohort_size=case.cohort,
            chunk_size=min(case.chunk, -(-case.cohort // case.processes)),
            new_client_fraction=0.0,
            val_fraction=0.0,
            test_fraction=0.0,
            seed=0,
            cache_dir=folder,
        )
        self.case = case

    def options(self) -> dict[str, Any]:
        """Return everything that the rows depend on."""
        case = self.case
        tokens = not case.hidden
        return {"population": case.population, "examples": case.examples, "spread": case.spread, "tokens": tokens}

    def class_count(self) -> int:
        """Return the number of classes or tokens."""
        return CLASSES if self.case.hidden else TOKENS

    def clients(self) -> Iterator[ClientData]:
        """Yield the clients of the population."""
        for first in range(0, self.case.population, AT_ONCE):
            random = np.random.default_rng(first)
            logs = random.normal(
                -(self.case.spread**2) / 2, self.case.spread, min(AT_ONCE, self.case.population - first)
            )
            sizes = np.maximum(1, np.rint(self.case.examples * np.exp(logs))).astype(np.int64)
            ends = np.cumsum(sizes)
            if self.case.hidden:
                x = random.standard_normal((ends[-1], FEATURES), dtype=np.float32)
                y = random.integers(CLASSES, size=ends[-1])
            else:
                tokens = (random.zipf(1.3, size=(ends[-1], STEPS + 1)) % (TOKENS - 1) + 1).astype(np.int16)
                x, y = tokens[..., :-1], tokens[..., 1:]
            for i, (end, size) in enumerate(zip(ends, sizes, strict=True)):
                yield ClientData(f"{first + i:08d}", x[end - size : end], y[end - size : end])


def main() -> None:
    folder, case = sys.argv[1], Case(**json.loads(sys.argv[2]))
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    trainer(10**6, [Turns()], processes()).fit(case.module(), datamodule=ScaledData(case, folder))


if __name__ == "__main__":
    main()
