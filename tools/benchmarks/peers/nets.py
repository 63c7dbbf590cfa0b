"""Models in plain torch, for peers that train torch modules."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tools.benchmarks.peers.handover import Handover


class _Recurrent(nn.LSTM):
    def forward(self, x: Tensor) -> Tensor:
        outputs: Tensor = super().forward(x)[0]
        return outputs


def make(handover: Handover) -> nn.Sequential:
    """Create the initial model."""
    shapes = [p.shape for p in handover.parameters]
    if handover.kind == "mlp":
        layers = [nn.Linear(*shapes[0][::-1]), nn.ReLU(), nn.Linear(*shapes[2][::-1])]
    elif handover.kind == "cnn":
        convolutions = [nn.Conv2d(1, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()]
        layers = [*convolutions, nn.Linear(*shapes[4][::-1]), nn.ReLU(), nn.Linear(*shapes[6][::-1])]
    else:
        recurrent = _Recurrent(shapes[1][1], shapes[2][1], batch_first=True)
        layers = [nn.Embedding(*shapes[0]), recurrent, nn.Linear(*shapes[5][::-1]), nn.Linear(*shapes[7][::-1])]
    model = nn.Sequential(*layers)
    with torch.no_grad():
        for p, initial in zip(model.parameters(), handover.parameters, strict=True):
            p.copy_(torch.from_numpy(initial))
    return model


def loss(outputs: Tensor, y: Tensor) -> Tensor:
    """Compute the mean cross-entropy, over tokens if examples are sequences."""
    return F.cross_entropy(outputs.flatten(0, -2), y.flatten())


def flat(model: nn.Module) -> np.ndarray:
    """Return a copy of the parameters as one vector."""
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()]).numpy()


def tensors(handover: Handover) -> list[tuple[Tensor, Tensor]]:
    """Return features and labels of each client."""
    return [(torch.from_numpy(x), torch.from_numpy(y)) for x, y in handover.clients]
