"""Run Flower's simulation, which trains in Ray actors."""

from __future__ import annotations

import sys

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation

from tools.benchmarks.peers import nets
from tools.benchmarks.peers.flwr_client import client_app
from tools.benchmarks.peers.gate import Gate
from tools.benchmarks.peers.handover import load


class EndError(Exception):
    """The contest has ended: Flower needs the number of rounds in advance."""


def serve(actors: int, cores: int) -> None:
    """Run the simulation with a number of actors, each with its share of the cores."""
    path = sys.argv[1]
    handover = load(path)
    gate, server_app = Gate(), ServerApp()

    def between_rounds(_: int, arrays: ArrayRecord) -> None:
        def model() -> np.ndarray:
            return np.concatenate([p.reshape(-1).numpy() for p in arrays.to_torch_state_dict().values()])

        if gate.next(model) is None:
            raise EndError

    @server_app.main()
    def main(grid: Grid, context: Context) -> None:
        clients = len(handover.clients)
        strategy = FedAvg(
            fraction_train=1.0, fraction_evaluate=0.0, min_train_nodes=clients, min_available_nodes=clients
        )
        strategy.start(
            grid=grid,
            initial_arrays=ArrayRecord(nets.make(handover).state_dict()),
            num_rounds=10**6,
            train_config=ConfigRecord({"path": path, "threads": cores // actors}),
            evaluate_fn=between_rounds,
        )

    backend = {
        "client_resources": {"num_cpus": cores // actors, "num_gpus": 0.0},
        "init_args": {"num_cpus": cores, "include_dashboard": False},
    }
    run_simulation(server_app, client_app, num_supernodes=len(handover.clients), backend_config=backend)


if __name__ == "__main__":
    serve(int(sys.argv[2]), int(sys.argv[3]))
