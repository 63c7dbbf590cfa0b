"""Run the contenders in this project's environment: the bare loop, our loop, and ours by lightning.Trainer.

Two processes share the clients by longest processing time and sum one flat buffer with gloo.
"""

from __future__ import annotations

import heapq
import logging
import os
import sys
import warnings
from collections.abc import Callable

import lightning
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, distributed

from tools.benchmarks.bare import Sequential
from tools.benchmarks.ours import LoopRounds, fit, flat
from tools.benchmarks.peers.gate import Gate, Settings, processes, rank
from tools.benchmarks.workloads import WORKLOADS, Clients, Workload


def share_settings(settings: Settings | None) -> Settings | None:
    """Send the first process's settings to all."""
    if processes() == 1:
        return settings
    box = [settings]
    distributed.broadcast_object_list(box)
    return box[0]


def sum_over_processes(total: Tensor) -> Tensor:
    """Sum a tensor over processes by one all-reduce."""
    if processes() > 1:
        distributed.all_reduce(total)
    return total


def own_share(clients: Clients) -> Clients:
    """Return the clients of this process, the largest first."""
    loads = [(0, number) for number in range(processes())]
    own = []
    for client in clients:
        load, number = heapq.heappop(loads)
        heapq.heappush(loads, (load + len(client[1]), number))
        if number == rank():
            own.append(client)
    return own


class Turns(Callback):
    """Waits at the start of each round of the Trainer."""

    def __init__(self) -> None:
        self.gate: Gate | None = None

    def on_train_epoch_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Wait; at the end of the contest, end the process."""
        if self.gate is None:
            self.gate = Gate(share_settings)
        settings = self.gate.next(lambda: flat(pl_module).numpy())
        if settings is None:
            os._exit(0)
        torch.set_num_threads(settings["threads"])


class BareShare(Sequential):
    """Runs the loop over the clients of this process, without a framework."""

    def __call__(self) -> None:
        super().__call__()
        if processes() > 1:
            total = sum_over_processes(self.flat())
            pieces = total.split([p.numel() for p in self.server])
            self.server = [piece.view_as(p) for piece, p in zip(pieces, self.server, strict=True)]


def loops(workload: Workload) -> None:
    """Run the bare loop, and ours with the server's step for any chunk size; each continues from its own model."""
    clients = own_share(workload.data())
    contender: BareShare | LoopRounds = BareShare(workload, clients)
    contenders = {0: contender}
    gate = Gate(share_settings)
    while settings := gate.next(lambda last=contender: last.flat().numpy()):
        torch.set_num_threads(settings["threads"])
        size = settings.get("chunk_size", 0)
        if size not in contenders:
            contenders[size] = LoopRounds(workload, clients, size, reduce=sum_over_processes)
        contender = contenders[size]
        contender()


def trainer(workload: Workload) -> None:
    """Run the Trainer with all costs of a user's run."""
    chunk_size, folder = int(sys.argv[3]), sys.argv[4]
    fit(workload, workload.data(), chunk_size, 10**6, folder, [Turns()], processes())


CONTENDERS: dict[str, Callable[[Workload], None]] = {"loops": loops, "trainer": trainer}


def main() -> None:
    kind, name = sys.argv[1:3]
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    if processes() > 1 and kind != "trainer":
        distributed.init_process_group("gloo")
    CONTENDERS[kind](WORKLOADS[name])


if __name__ == "__main__":
    main()
