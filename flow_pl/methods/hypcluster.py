"""HypCluster: Mansour et al., Three Approaches for Personalization with Applications to Federated Learning (2020)."""

from __future__ import annotations

import copy
from functools import reduce

import torch
from torch import Tensor, nn

from flow_pl.errors import ConfigurationError
from flow_pl.methods.base import Prediction
from flow_pl.methods.fedavg import FedAvg
from flow_pl.methods.parts.pieces import pieces
from flow_pl.methods.steps import Derive, Minibatch, Phase
from flow_pl.utils.groups import Groups, Parameters
from flow_pl.utils.inputs import Inputs
from flow_pl.utils.validation import require_count


class HypCluster(FedAvg):
    """Keeps K global models; a client trains the one that fits its data best (Section 3, user clustering).

    In a round every sampled client gets all K models, picks the one with the lowest loss on its own training data,
    trains it as FedAvg does and sends it; the server averages each model over the clients that picked it. A model that
    no client picked stays unchanged. The personal model is the picked one, unchanged. The generalized one, which must
    not depend on the client's data, is the mean of the K models' probabilities. Stateless.

    The first model is the backbone; the others start from their own initial weights.

    Args:
        clusters: number of global models (K); 1 is FedAvg.

    Raises:
        ConfigurationError: `clusters` is not positive.
    """

    participation = "participation"

    def __init__(self, clusters: int = 2) -> None:
        require_count(clusters=clusters)
        self.models = ["global", *(f"cluster_{i}" for i in range(1, clusters))]
        self.shared = dict.fromkeys(self.models, "picked")

    def server_modules(self) -> dict[str, nn.Module]:
        """Return the models besides the backbone."""
        return {name: _reinitialized(self.model.backbone) for name in self.models[1:]}

    def initialize(self, x: Inputs) -> None:
        """Initialize the lazy modules of every model.

        Raises:
            ConfigurationError: two models are identical, and would stay so.
        """
        for name in self.models:
            self.modules[name](x)
        first = list(self.modules["global"].parameters())
        for name in self.models[1:]:
            if all(torch.equal(p, q) for p, q in zip(first, self.modules[name].parameters(), strict=True)):
                raise ConfigurationError(
                    f"the {len(self.models)} models of HypCluster would start with the same weights, since no block of "
                    f"{type(self.model.backbone).__name__} can draw new ones: give the blocks that hold parameters a "
                    "method reset_parameters, like torch's own, or set clusters to 1."
                )

    def start(self, server: Groups) -> Groups:
        """Return the K models, and a placeholder for the picked one."""
        return {**server, "picked": server["global"]}

    def training(self) -> tuple[Phase | Derive, ...]:
        """Pick a model and train it on all the data."""
        return (Derive("all", self._pick), Phase("all", (self.train_step("picked"),)))

    def personalization(self) -> tuple[Phase | Derive, ...]:
        """Pick a model."""
        return (Derive("all", self._pick),)

    def personal(self, groups: Groups) -> Parameters | None:
        """Return the picked model."""
        return groups["picked"]

    def generalized(self, groups: Groups, x: Inputs) -> Tensor:
        """Compute the outputs of all models together: the mean of their probabilities."""
        if len(self.models) == 1:
            return super().generalized(groups, x)
        probabilities = (self.objective.probabilities(self.model.plain(x, groups[name])) for name in self.models)
        return self.objective.outputs(reduce(torch.add, probabilities) / len(self.models))

    def predict(self, groups: Groups, x: Inputs) -> Prediction:
        """Predict with all models together, and with the picked one."""
        picked = self.personalized(groups, x)
        return Prediction(self.generalized(groups, x), picked, local=picked)

    def _pick(self, groups: Groups, examples: Minibatch) -> Groups:
        """Pick the model with the lowest loss on the examples, the first of equals; mark it by 1, the others by 0."""
        losses = torch.stack([self._summed_loss(groups, name, examples) for name in self.models])
        choice = losses.argmin()
        models = {key: torch.stack([groups[name][key] for name in self.models]) for key in groups["global"]}
        picked = {key: p.index_select(0, choice.view(1)).squeeze(0) for key, p in models.items()}
        return {
            "picked": picked,
            "participation": {name: (choice == i).to(losses.dtype) for i, name in enumerate(self.models)},
        }

    def _summed_loss(self, groups: Groups, name: str, examples: Minibatch) -> Tensor:
        """Sum a model's loss; on the same examples this ranks models as the mean does."""
        total = torch.zeros((), device=examples.mask.device)
        for piece in pieces(examples):
            losses = self.objective.losses(self.model.plain(piece.x, groups[name]), piece.y)
            total = total + (losses * self.objective.in_loss(piece.y, piece.mask)).sum()
        return total


def _reinitialized(backbone: nn.Module) -> nn.Module:
    """Copy a module with new initial weights wherever it can draw them; frozen weights stay the backbone's."""
    other = copy.deepcopy(backbone)
    for module in other.modules():
        reset = getattr(module, "reset_parameters", None)
        if callable(reset):
            reset()
    for name, p in backbone.named_parameters():
        if not p.requires_grad:
            owner, _, key = name.rpartition(".")
            setattr(other.get_submodule(owner), key, p)
    return other
