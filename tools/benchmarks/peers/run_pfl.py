"""Run pfl-research's federated averaging on PyTorch; in two processes by its use of torch.distributed."""

from __future__ import annotations

from functools import partial

import torch
from pfl.aggregate.simulate import SimulatedBackend
from pfl.aggregate.weighting import WeightByDatapoints
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data.federated_dataset import FederatedDataset
from pfl.data.pytorch import PyTorchTensorDataset
from pfl.data.sampling import get_user_sampler
from pfl.hyperparam.base import NNTrainHyperParams
from pfl.metrics import Metrics, Weighted
from pfl.model.pytorch import PyTorchModel

from tools.benchmarks.peers import nets
from tools.benchmarks.peers.gate import Gate, Settings, processes
from tools.benchmarks.peers.handover import load


class Module(torch.nn.Module):
    """A model with the loss and the metrics that pfl requires."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def loss(self, x, y):
        return nets.loss(self.model(x), y)

    @torch.no_grad()
    def metrics(self, x, y):
        return {"loss": Weighted(float(self.loss(x, y)) * len(x), len(x))}


class Turns(TrainingProcessCallback):
    """Waits between rounds."""

    def __init__(self, gate: Gate, model: torch.nn.Module) -> None:
        self.gate = gate
        self.model = model

    def _wait(self) -> bool:
        settings = self.gate.next(lambda: nets.flat(self.model))
        if settings is not None:
            torch.set_num_threads(settings["threads"])
        return settings is None

    def on_train_begin(self, *, model):
        self._wait()
        return Metrics()

    def after_central_iteration(self, aggregate_metrics, model, *, central_iteration):
        return self._wait(), Metrics()


def share(settings: Settings | None) -> Settings | None:
    """Send the first process's settings to all."""
    if processes() == 1:
        return settings
    box = [settings]
    torch.distributed.broadcast_object_list(box)
    return box[0]


def main() -> None:
    handover = load()
    module = Module(nets.make(handover))
    users = {str(i): PyTorchTensorDataset(client, user_id=str(i)) for i, client in enumerate(nets.tensors(handover))}
    data = FederatedDataset(users.__getitem__, get_user_sampler("minimize_reuse", list(users)))
    local = partial(torch.optim.SGD, momentum=handover.momentum)
    FederatedAveraging().run(
        algorithm_params=NNAlgorithmParams(
            central_num_iterations=10**6,
            evaluation_frequency=10**9,
            train_cohort_size=len(users),
            val_cohort_size=None,
        ),
        backend=SimulatedBackend(data, data, postprocessors=[WeightByDatapoints()]),
        model=PyTorchModel(module, local, torch.optim.SGD(module.parameters(), lr=1.0)),
        model_train_params=NNTrainHyperParams(
            local_num_epochs=1, local_learning_rate=handover.lr, local_batch_size=handover.batch_size
        ),
        callbacks=[Turns(Gate(share), module)],
        send_metrics_to_platform=False,
    )


if __name__ == "__main__":
    main()
